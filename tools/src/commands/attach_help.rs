//! `afterimage attach-help`: the exact words that attach a disk to a hypervisor or a client.
//!
//! `tests/interop/attach_help_says_what_works.py` runs the lines for QEMU and libnbd as they are
//! printed; a guest of `tests/vm/kernel_client_in_the_guest.py` attaches with nbd-client's options, but
//! not with the printed line. Those for libvirt and Proxmox are not run: they are QEMU's in other words.

use anyhow::bail;
use serde::Serialize;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use crate::cli::output::Output;
use crate::cli::values::DiskRef;
use crate::config::Config;
use crate::config::schema::Listener;
use crate::config::units::ListenAddress;

/// Where QEMU and libvirt look for certificates unless they are told otherwise.
pub const CERTIFICATES: &str = "/etc/pki/qemu";

/// How to attach one disk, by client.
#[derive(Debug, Serialize)]
pub struct AttachHelp {
    /// NBD URI of the disk.
    pub uri: String,
    /// What has to be there first, or be put in.
    pub notes: Vec<String>,
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

/// What a client needs for a listener's TLS.
#[derive(Clone, Copy, Debug)]
pub struct ClientNeeds<'a> {
    /// Folder with the certificates, as QEMU and libnbd name them.
    pub certificates: &'a Path,
    /// A certificate of its own, too.
    pub own: bool,
}

/// Runs the command.
///
/// # Errors
/// When the disk is not configured or no listener serves it.
pub fn run(
    config: &Config,
    disk: &DiskRef,
    certificates: &Path,
    output: Output,
) -> anyhow::Result<()> {
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
    let tls = listener.tls.as_ref().map(|tls| ClientNeeds {
        certificates,
        own: tls.client_ca.is_some(),
    });
    let help = for_listener(&listener.address, tls, &disk.to_string());
    output.result(&help, AttachHelp::to_text)?;
    Ok(())
}

/// The snippets for an export behind an address.
#[must_use]
pub fn for_listener(
    address: &ListenAddress,
    tls: Option<ClientNeeds<'_>>,
    export: &str,
) -> AttachHelp {
    let node = export.rsplit('/').next().unwrap_or(export);
    let uri = uri(address, tls.is_some(), export);
    let (server, hosts, client) = match address {
        ListenAddress::Unix(path) => {
            let path = path.display().to_string();
            (
                format!("server.type=unix,server.path={}", path.replace(',', ",,")),
                format!("<host transport='unix' socket='{}'/>", attribute(&path)),
                format!("-unix {}", quoted(&path)),
            )
        }
        ListenAddress::Tcp(tcp) => {
            let (host, port) = (host(tcp), tcp.port());
            (
                format!("server.type=inet,server.host={host},server.port={port}"),
                format!("<host name='{host}' port='{port}'/>"),
                format!("{host} {port}"),
            )
        }
    };
    let creds = tls.map_or(String::new(), |tls| {
        let folder = tls.certificates.display().to_string().replace(',', ",,");
        let object = format!("tls-creds-x509,id=tls0,endpoint=client,dir={folder}");
        format!("-object {} ", quoted(&object))
    });
    let with_creds = if tls.is_some() { ",tls-creds=tls0" } else { "" };
    let blockdev = quoted(&format!(
        "driver=nbd,node-name={node},{server},export={export},reconnect-delay=300,open-timeout=60,\
         discard=unmap,detect-zeroes=unmap{with_creds}"
    ));
    let qemu = [
        format!("{creds}-object iothread,id=io-{node}"),
        format!("-blockdev {blockdev}"),
        format!("-device virtio-blk-pci,drive={node},iothread=io-{node},werror=stop,rerror=stop"),
    ];
    let tls_attribute = if tls.is_some() { " tls='yes'" } else { "" };
    let for_libnbd = quoted(&match tls {
        None => uri.clone(),
        Some(tls) => {
            let more = if uri.contains('?') { '&' } else { '?' };
            let folder = encoded(tls.certificates.as_os_str().as_bytes());
            format!("{uri}{more}tls-certificates={folder}")
        }
    });
    AttachHelp {
        notes: notes(address, tls),
        qemu: qemu.join(" \\\n"),
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
        proxmox: format!("args: {}", qemu.join(" ")),
        nbd_client: format!(
            "modprobe nbd && nbd-client -N {export} {client} /dev/nbd0 \
             -b 4096 -C 4 -persist -nonetlink{}",
            tls.map_or(String::new(), nbd_client_tls)
        ),
        libnbd: format!("nbdinfo {for_libnbd}\nnbdcopy {for_libnbd} ./{node}.raw"),
        uri,
    }
}

fn nbd_client_tls(tls: ClientNeeds<'_>) -> String {
    let file = |name: &str| quoted(&tls.certificates.join(name).display().to_string());
    let mut options = format!(" -x -cacertfile {}", file("ca-cert.pem"));
    if tls.own {
        let (cert, key) = (file("client-cert.pem"), file("client-key.pem"));
        let _ = write!(options, " -certfile {cert} -keyfile {key}");
    }
    options
}

fn notes(address: &ListenAddress, tls: Option<ClientNeeds<'_>>) -> Vec<String> {
    let mut notes = Vec::new();
    if let ListenAddress::Tcp(tcp) = address
        && tcp.ip().is_unspecified()
    {
        notes.push(format!(
            "The listener takes connections at every address of this host. {} stands for the one that \
             the client reaches it at{}.",
            host(tcp),
            if tls.is_some() {
                ", which the server's certificate must be valid for"
            } else {
                ""
            }
        ));
    }
    if let Some(tls) = tls {
        let folder = tls.certificates.display();
        notes.push(if tls.own {
            format!(
                "The listener demands a client certificate that its client_ca signed and whose SAN names the \
                 group ('afterimage cert client' makes one). The client needs in {folder}: ca-cert.pem, the \
                 certificate of the authority that signed the server's (ca.pem); client-cert.pem and \
                 client-key.pem, its own certificate and key."
            )
        } else {
            format!(
                "The client needs in {folder}: ca-cert.pem, the certificate of the authority that signed the \
                 server's (ca.pem)."
            )
        });
        notes.push(format!(
            "libvirt looks where nbd_tls_x509_cert_dir in its qemu.conf says, {CERTIFICATES} by default."
        ));
    }
    notes
}

/// The NBD URI of an export.
#[must_use]
pub fn uri(address: &ListenAddress, tls: bool, export: &str) -> String {
    let s = if tls { "s" } else { "" };
    let export = encoded(export.as_bytes());
    match address {
        ListenAddress::Unix(path) => {
            let path = encoded(path.as_os_str().as_bytes());
            format!("nbd{s}+unix:///{export}?socket={path}")
        }
        ListenAddress::Tcp(tcp) => {
            let (host, port) = (host(tcp), tcp.port());
            match tcp.is_ipv6() && host.contains(':') {
                true => format!("nbd{s}://[{host}]:{port}/{export}"),
                false => format!("nbd{s}://{host}:{port}/{export}"),
            }
        }
    }
}

/// What a client connects to: the address, or where it stands for all of them the host's name.
fn host(tcp: &SocketAddr) -> String {
    if !tcp.ip().is_unspecified() {
        return tcp.ip().to_string();
    }
    let name = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    let usable = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
    match !name.is_empty() && name.chars().all(usable) {
        true => name,
        false => "THIS-HOST".to_owned(),
    }
}

/// Percent-encoded for the path or the query of a URI.
fn encoded(bytes: &[u8]) -> String {
    let mut text = String::new();
    for &byte in bytes {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => text.push(byte.into()),
            b'-' | b'.' | b'_' | b'~' | b'/' | b':' | b'@' | b',' => text.push(byte.into()),
            _ => {
                let _ = write!(text, "%{byte:02X}");
            }
        }
    }
    text
}

/// One word for the shell.
#[must_use]
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._/:@,=+%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

/// The value of an attribute in XML.
fn attribute(value: &str) -> String {
    let value = value.replace('&', "&amp;").replace('<', "&lt;");
    value.replace('>', "&gt;").replace('\'', "&apos;")
}

impl AttachHelp {
    /// All snippets with a word on each.
    #[must_use]
    pub fn to_text(&self) -> String {
        let notes: String = self
            .notes
            .iter()
            .map(|note| format!("{note}\n\n"))
            .collect();
        format!(
            "{notes}URI\n\n{}\n\n\
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
        let help = for_listener(&address, None, "vm1/vda");
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
        let needs = |own| {
            let certificates = Path::new("/certs of/vm1");
            for_listener(&address, Some(ClientNeeds { certificates, own }), "vm1/vda")
        };
        let help = needs(true);
        assert_eq!(help.uri, "nbds://192.0.2.1:10809/vm1/vda");
        assert!(help.qemu.contains("tls-creds=tls0"));
        let object = "-object 'tls-creds-x509,id=tls0,endpoint=client,dir=/certs of/vm1' ";
        assert!(help.qemu.starts_with(object), "{}", help.qemu);
        assert!(help.libvirt.contains("tls='yes'"));
        let folder = "nbdinfo 'nbds://192.0.2.1:10809/vm1/vda?tls-certificates=/certs%20of/vm1'";
        assert!(help.libnbd.starts_with(folder), "{}", help.libnbd);
        let own =
            "-certfile '/certs of/vm1/client-cert.pem' -keyfile '/certs of/vm1/client-key.pem'";
        assert!(help.nbd_client.ends_with(own), "{}", help.nbd_client);
        assert!(help.to_text().contains("client_ca"));
        let help = needs(false);
        assert!(!help.to_text().contains("client-key.pem"));
        let ca = "-x -cacertfile '/certs of/vm1/ca-cert.pem'";
        assert!(help.nbd_client.ends_with(ca), "{}", help.nbd_client);
    }

    #[test]
    fn nobody_is_told_to_connect_to_every_address() {
        for text in ["tcp://0.0.0.0:10809", "tcp://[::]:10809"] {
            let address: ListenAddress = text.parse().expect("valid");
            let help = for_listener(&address, None, "vm1/vda");
            let said = help.to_text();
            assert!(!said.contains("0.0.0.0") && !said.contains("::"), "{said}");
            assert!(help.notes[0].contains("every address"), "{said}");
        }
        let six: ListenAddress = "tcp://[2001:db8::1]:10809".parse().expect("valid");
        let help = for_listener(&six, None, "vm1/vda");
        assert_eq!(help.uri, "nbd://[2001:db8::1]:10809/vm1/vda");
        assert!(help.qemu.contains("server.host=2001:db8::1,"));
    }

    #[test]
    fn odd_paths_arrive_as_they_are() {
        let address = ListenAddress::Unix("/run/it's & <co>,50%.sock".into());
        let help = for_listener(&address, None, "vm1/vda");
        let uri = "nbd+unix:///vm1/vda?socket=/run/it%27s%20%26%20%3Cco%3E,50%25.sock";
        assert_eq!(help.uri, uri);
        assert!(
            help.qemu
                .contains(r"server.path=/run/it'\''s & <co>,,50%.sock,export"),
            "{}",
            help.qemu
        );
        assert!(
            help.libvirt
                .contains("socket='/run/it&apos;s &amp; &lt;co&gt;,50%.sock'/>")
        );
        assert!(
            help.nbd_client
                .contains(r"-unix '/run/it'\''s & <co>,50%.sock' /dev/nbd0")
        );
    }
}
