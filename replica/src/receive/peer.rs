//! Who speaks: this process itself, or the holder of a certificate that TLS has verified.
//!
//! The certificate's SANs say which groups it may write (`proxy::tls::Identity`). The SAN that
//! allowed the first session of a group is bound to the group, and every later session must be
//! allowed by the same.

use afterimage_proxy::tls::Identity;

/// The other side of a session.
#[derive(Debug, Clone)]
pub enum Peer {
    /// This process itself, writing its own repository.
    Direct,
    /// A client with a verified certificate.
    Certificate {
        /// What the certificate says.
        identity: Identity,
        /// Where it comes from, for messages.
        address: String,
    },
}

impl Peer {
    /// The SAN that allows this group, empty for a direct writer; `None` if nothing does.
    #[must_use]
    pub fn grant(&self, group: &str) -> Option<&str> {
        match self {
            Self::Direct => Some(""),
            Self::Certificate { identity, .. } => identity.grant(group),
        }
    }

    /// For messages.
    #[must_use]
    pub fn address(&self) -> &str {
        match self {
            Self::Direct => "this process",
            Self::Certificate { address, .. } => address,
        }
    }

    /// All SANs, for messages.
    #[must_use]
    pub fn sans(&self) -> String {
        match self {
            Self::Direct => String::new(),
            Self::Certificate { identity, .. } => identity.names().join(", "),
        }
    }
}
