//! `afterimage attach-help`: the exact words that attach a disk to a hypervisor or a client.
//!
//! The snippets are run by the tests in `tests/interop`; a change here is a change there.

use anyhow::bail;
use serde::Serialize;

use crate::cli::output::Output;
use crate::cli::values::DiskRef;
use crate::config::Config;
use crate::config::schema::Listener;
use crate::config::units::ListenAddress;

/// How to attach one disk, by client.
#[derive(Debug, Serialize)]
pub struct AttachHelp {
    /// NBD URI of the disk.
    pub uri: String,
    /// Arguments of `qemu-system-*`.
    pub qemu: String,
    /// XML of a libvirt domain.
    pub libvirt: String,
    /// Line for a Proxmox VM's configuration.
    pub proxmox: String,
    /// Command for the kernel's client.
    pub nbd_client: String,
    /// Commands of libnbd.
    pub libnbd: String,
}

/// Runs the command.
///
/// # Errors
/// When the disk is not configured or no listener serves it.
pub fn run(config: &Config, disk: &DiskRef, output: Output) -> anyhow::Result<()> {
    let Some(group) = config.group(&disk.group) else {
        bail!(
            "group '{}' is not configured in {}",
            disk.group,
            config.file.display()
        );
    };
    if !group.disks.iter().any(|d| d.name == disk.disk) {
        let known: Vec<&str> = group.disks.iter().map(|d| d.name.as_str()).collect();
        bail!(
            "group '{}' has no disk '{}'; it has {}",
            disk.group,
            disk.disk,
            known.join(", ")
        );
    }
    let serves = |l: &&Listener| {
        let groups = l.groups.as_ref();
        groups.is_none_or(|names| names.iter().any(|g| *g.get_ref() == disk.group))
    };
    let Some(listener) = config.listeners.iter().find(serves) else {
        bail!("no listener in [nbd] listen serves group '{}'", disk.group);
    };
    let help = for_listener(&listener.address, listener.tls.is_some(), &disk.to_string());
    output.result(&help, AttachHelp::to_text)?;
    Ok(())
}

/// The snippets for an export behind an address.
#[must_use]
pub fn for_listener(address: &ListenAddress, tls: bool, export: &str) -> AttachHelp {
    let node = export.rsplit('/').next().unwrap_or(export);
    let uri = uri(address, tls, export);
    let scheme = if tls { ",tls-creds=tls0" } else { "" };
    let creds = if tls {
        "-object tls-creds-x509,id=tls0,endpoint=client,dir=/etc/pki/qemu \\\n"
    } else {
        ""
    };
    let (server, hosts, client) = match address {
        ListenAddress::Unix(path) => (
            format!("server.type=unix,server.path={}", path.display()),
            format!("<host transport='unix' socket='{}'/>", path.display()),
            format!("-unix {}", path.display()),
        ),
        ListenAddress::Tcp(tcp) => (
            format!(
                "server.type=inet,server.host={},server.port={}",
                tcp.ip(),
                tcp.port()
            ),
            format!("<host name='{}' port='{}'/>", tcp.ip(), tcp.port()),
            format!("{} {}", tcp.ip(), tcp.port()),
        ),
    };
    let tls_attribute = if tls { " tls='yes'" } else { "" };
    AttachHelp {
        qemu: format!(
            "{creds}-object iothread,id=io-{node} \\\n\
             -blockdev driver=nbd,node-name={node},{server},export={export},reconnect-delay=300,\
             open-timeout=60,discard=unmap,detect-zeroes=unmap{scheme} \\\n\
             -device virtio-blk-pci,drive={node},iothread=io-{node},werror=stop,rerror=stop"
        ),
        libvirt: format!(
            "<disk type='network' device='disk'>\n\
             \x20 <driver name='qemu' type='raw' discard='unmap' detect_zeroes='unmap' error_policy='stop'/>\n\
             \x20 <source protocol='nbd' name='{export}'{tls_attribute}>\n\
             \x20   {hosts}\n\
             \x20   <reconnect delay='300'/>\n\
             \x20 </source>\n\
             \x20 <target dev='{node}' bus='virtio'/>\n\
             </disk>"
        ),
        proxmox: format!(
            "args: {} ",
            format!(
                "{creds}-object iothread,id=io-{node} \
                 -blockdev driver=nbd,node-name={node},{server},export={export},reconnect-delay=300,\
                 open-timeout=60,discard=unmap,detect-zeroes=unmap{scheme} \
                 -device virtio-blk-pci,drive={node},iothread=io-{node},werror=stop,rerror=stop"
            )
            .replace("\\\n", "")
        )
        .trim_end()
        .to_owned(),
        nbd_client: format!(
            "modprobe nbd && nbd-client -N {export} {client} /dev/nbd0 \
             -b 4096 -C 4 -persist -nonetlink{}",
            if tls { " -x" } else { "" }
        ),
        libnbd: format!("nbdinfo '{uri}'\nnbdcopy '{uri}' ./{node}.raw"),
        uri,
    }
}

/// The NBD URI of an export.
#[must_use]
pub fn uri(address: &ListenAddress, tls: bool, export: &str) -> String {
    let s = if tls { "s" } else { "" };
    match address {
        ListenAddress::Unix(path) => {
            format!("nbd{s}+unix:///{export}?socket={}", path.display())
        }
        ListenAddress::Tcp(tcp) => format!("nbd{s}://{tcp}/{export}"),
    }
}

impl AttachHelp {
    /// All snippets with a word on each.
    #[must_use]
    pub fn to_text(&self) -> String {
        format!(
            "URI\n\n{}\n\n\
             QEMU (without reconnect-delay a restart of afterimage would be an I/O error for the guest)\n\n{}\n\n\
             libvirt (leave <reconnect> away before version 8.10)\n\n{}\n\n\
             Proxmox (one line in /etc/pve/qemu-server/VMID.conf)\n\n{}\n\n\
             Linux kernel (nbd-client 3.24: -persist needs -nonetlink)\n\n{}\n\n\
             libnbd\n\n{}\n",
            self.uri, self.qemu, self.libvirt, self.proxmox, self.nbd_client, self.libnbd
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snippets_name_export_and_socket() {
        let address = ListenAddress::Unix("/run/afterimage/nbd.sock".into());
        let help = for_listener(&address, false, "vm1/vda");
        assert_eq!(
            help.uri,
            "nbd+unix:///vm1/vda?socket=/run/afterimage/nbd.sock"
        );
        for part in [
            "export=vm1/vda",
            "reconnect-delay=300",
            "werror=stop",
            "node-name=vda",
        ] {
            assert!(help.qemu.contains(part), "{}", help.qemu);
        }
        assert!(!help.qemu.contains("aio="));
        assert!(!help.proxmox.contains('\n'), "{}", help.proxmox);
        assert!(help.libvirt.contains("socket='/run/afterimage/nbd.sock'"));
        assert!(
            help.nbd_client
                .contains("-N vm1/vda -unix /run/afterimage/nbd.sock /dev/nbd0")
        );
    }

    #[test]
    fn tls_shows_everywhere() {
        let address: ListenAddress = "tcp://192.0.2.1:10809".parse().expect("valid");
        let help = for_listener(&address, true, "vm1/vda");
        assert_eq!(help.uri, "nbds://192.0.2.1:10809/vm1/vda");
        assert!(help.qemu.contains("tls-creds=tls0"));
        assert!(help.libvirt.contains("tls='yes'"));
    }
}
