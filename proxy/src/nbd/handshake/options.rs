//! Option haggling: one option after the other until the client opens an export, leaves, or
//! upgrades to TLS.

use super::{HandshakeError, OPTION_DATA_MAX, OPTIONS_MAX, TlsPolicy, Wire};
use crate::nbd::export::{ExportInfo, Exports, Negotiated, OpenError, Peer, group_of};
use crate::nbd::session::{ContextKind, MetaContext};
use afterimage_format::nbd::constants::{
    CONTEXT_ALLOCATION, CONTEXT_DIRTY, STRING_BYTES_MAX, info, opt, rep,
};
use afterimage_format::nbd::option::{
    InfoQuery, MetaQuery, OptionHeader, export_name_answer, info_block_size, info_export,
    info_text, meta_context_data, push_reply, server_data, text,
};
use afterimage_format::nbd::reply::ReplyForm;
use rustls::ServerConfig;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};

/// Block sizes told to clients: any size goes, 4 KiB is best, 32 MiB is more than enough.
const BLOCK_SIZES: (u32, u32, u32) = (1, 4096, 32 << 20);

/// How a round of haggling ends.
pub(super) enum Ending {
    Open(Negotiated),
    StartTls(Arc<ServerConfig>),
    /// ABORT.
    Left,
}

/// An answer that refuses an option.
struct Refused {
    kind: u32,
    message: &'static str,
}

const fn refused(kind: u32, message: &'static str) -> Refused {
    Refused { kind, message }
}

/// What the client has chosen so far.
pub(super) struct Haggle<'a> {
    fixed: bool,
    no_zeroes: bool,
    tls: &'a TlsPolicy,
    encrypted: bool,
    options: u32,
    form: ReplyForm,
    /// Contexts, and the canonical name of the export they were selected for.
    contexts: Option<(String, Vec<MetaContext>)>,
}

impl<'a> Haggle<'a> {
    pub(super) fn new(fixed: bool, no_zeroes: bool, tls: &'a TlsPolicy) -> Self {
        Self {
            fixed,
            no_zeroes,
            tls,
            encrypted: false,
            options: 0,
            form: ReplyForm::Simple,
            contexts: None,
        }
    }

    /// TLS is on: everything the client chose is forgotten. The flags of the greeting, which are
    /// exchanged once only, and the count of options stay.
    pub(super) fn restart_encrypted(&mut self) {
        *self = Self {
            encrypted: true,
            options: self.options,
            ..Self::new(self.fixed, self.no_zeroes, self.tls)
        };
    }

    pub(super) async fn run<S>(
        &mut self,
        wire: &mut Wire<'_, S>,
        peer: &Peer,
        exports: &dyn Exports,
    ) -> Result<Ending, HandshakeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let must_encrypt = matches!(self.tls, TlsPolicy::Forced(_)) && !self.encrypted;
        loop {
            let header = OptionHeader::decode(&wire.receive().await?)?;
            let option = header.option;
            self.options += 1;
            if self.options > OPTIONS_MAX {
                return Err(HandshakeError::TooManyOptions);
            }
            if !self.fixed && option != opt::EXPORT_NAME {
                return Err(HandshakeError::NotFixed(option));
            }
            if option == opt::EXPORT_NAME {
                if must_encrypt {
                    return Err(HandshakeError::TlsRequired);
                }
                return self.export_name(header, wire, peer, exports).await;
            }
            let mut answer = Vec::new();
            if option == opt::ABORT {
                wire.skip(header.length).await?;
                push_reply(&mut answer, option, rep::ACK, &[]);
                // The client may be gone already; that is fine.
                let _ = wire.send(&answer).await;
                return Ok(Ending::Left);
            }
            let mut ending = None;
            let result = if must_encrypt && option != opt::STARTTLS {
                wire.skip(header.length).await?;
                Err(refused(rep::ERR_TLS_REQD, "this listener demands TLS"))
            } else if header.length > OPTION_DATA_MAX {
                wire.skip(header.length).await?;
                Err(refused(rep::ERR_TOO_BIG, "the option's data is too long"))
            } else {
                let mut data = vec![0; header.length as usize];
                wire.receive_into(&mut data).await?;
                let peer = (peer, exports);
                self.option(option, &data, wire, peer, &mut answer, &mut ending)
                    .await
            };
            if let Err(refused) = result {
                answer.clear();
                push_reply(
                    &mut answer,
                    option,
                    refused.kind,
                    refused.message.as_bytes(),
                );
            }
            if let Some(Ending::Open(negotiated)) = ending {
                return Ok(Ending::Open(Negotiated {
                    answer,
                    ..negotiated
                }));
            }
            wire.send(&answer).await?;
            if let Some(ending) = ending {
                return Ok(ending);
            }
        }
    }

    async fn option<S>(
        &mut self,
        option: u32,
        data: &[u8],
        wire: &mut Wire<'_, S>,
        (peer, exports): (&Peer, &dyn Exports),
        answer: &mut Vec<u8>,
        ending: &mut Option<Ending>,
    ) -> Result<(), Refused>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let no_data = || {
            if data.is_empty() {
                Ok(())
            } else {
                Err(refused(rep::ERR_INVALID, "this option has no data"))
            }
        };
        match option {
            opt::LIST => {
                no_data()?;
                for export in wire.work(exports.list(peer)).await {
                    if peer.may_open(group_of(&export.name)) {
                        let data = server_data(&export.name, &export.description);
                        push_reply(answer, option, rep::SERVER, &data);
                    }
                }
            }
            opt::STARTTLS => {
                no_data()?;
                if self.encrypted {
                    return Err(refused(rep::ERR_INVALID, "TLS is on already"));
                }
                match self.tls {
                    TlsPolicy::Off => {
                        return Err(refused(rep::ERR_POLICY, "this listener has no TLS"));
                    }
                    TlsPolicy::Offered(config) | TlsPolicy::Forced(config) => {
                        *ending = Some(Ending::StartTls(config.clone()));
                    }
                }
            }
            opt::INFO | opt::GO => {
                let query = InfoQuery::decode(data)
                    .map_err(|_| refused(rep::ERR_INVALID, "malformed query"))?;
                let go = option == opt::GO;
                let export = wire
                    .work(open(query.name, peer, exports, go))
                    .await
                    .map_err(open_refused)?;
                self.push_info(answer, option, &query, &export);
                if go {
                    *ending = Some(Ending::Open(self.negotiated(export, peer)));
                }
            }
            opt::STRUCTURED_REPLY => {
                no_data()?;
                match self.form {
                    ReplyForm::Simple => self.form = ReplyForm::Structured,
                    ReplyForm::Structured => {
                        return Err(refused(rep::ERR_INVALID, "agreed already"));
                    }
                    ReplyForm::Extended => {
                        let message = "extended headers are agreed already";
                        return Err(refused(rep::ERR_EXT_HEADER_REQD, message));
                    }
                }
            }
            opt::EXTENDED_HEADERS => {
                no_data()?;
                if self.form == ReplyForm::Extended {
                    return Err(refused(rep::ERR_INVALID, "agreed already"));
                }
                self.form = ReplyForm::Extended;
            }
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => {
                let set = option == opt::SET_META_CONTEXT;
                if set {
                    self.contexts = None;
                }
                let query = MetaQuery::decode(data)
                    .map_err(|_| refused(rep::ERR_INVALID, "malformed query"))?;
                if self.form == ReplyForm::Simple {
                    return Err(refused(rep::ERR_INVALID, "structured replies first"));
                }
                let export = wire
                    .work(open(query.name, peer, exports, false))
                    .await
                    .map_err(open_refused)?;
                let mut selected = Vec::new();
                for (id, kind, name) in contexts_of(&export) {
                    if !matches_any(&query.queries, name, set) {
                        continue;
                    }
                    selected.push(MetaContext { id, kind });
                    let id = if set { id } else { 0 };
                    let data = meta_context_data(id, name);
                    push_reply(answer, option, rep::META_CONTEXT, &data);
                }
                if set {
                    self.contexts = Some((export.name, selected));
                }
            }
            _ => return Err(refused(rep::ERR_UNSUP, "unknown option")),
        }
        push_reply(answer, option, rep::ACK, &[]);
        Ok(())
    }

    fn push_info(
        &self,
        answer: &mut Vec<u8>,
        option: u32,
        query: &InfoQuery<'_>,
        export: &ExportInfo,
    ) {
        let flags = export.flags(self.form);
        let mut push = |data: &[u8]| push_reply(answer, option, rep::INFO, data);
        push(&info_export(export.size, flags));
        let wants = |item: u16| query.items.contains(&item);
        if wants(info::NAME) || query.name != export.name {
            push(&info_text(info::NAME, &export.name));
        }
        if wants(info::DESCRIPTION) && !export.description.is_empty() {
            push(&info_text(info::DESCRIPTION, &export.description));
        }
        if wants(info::BLOCK_SIZE) {
            let (minimum, preferred, maximum) = BLOCK_SIZES;
            push(&info_block_size(minimum, preferred, maximum));
        }
    }

    async fn export_name<S>(
        &mut self,
        header: OptionHeader,
        wire: &mut Wire<'_, S>,
        peer: &Peer,
        exports: &dyn Exports,
    ) -> Result<Ending, HandshakeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let length = header.length as usize;
        if length > STRING_BYTES_MAX {
            return Err(afterimage_format::nbd::option::OptionError::StringTooLong(length).into());
        }
        let mut data = vec![0; length];
        wire.receive_into(&mut data).await?;
        let name = text(&data)?;
        let export = wire
            .work(open(name, peer, exports, true))
            .await
            .map_err(|source| HandshakeError::ExportName {
                name: name.into(),
                source,
            })?;
        let answer = export_name_answer(export.size, export.flags(self.form), self.no_zeroes);
        Ok(Ending::Open(Negotiated {
            answer,
            ..self.negotiated(export, peer)
        }))
    }

    fn negotiated(&mut self, export: ExportInfo, peer: &Peer) -> Negotiated {
        let contexts = match self.contexts.take() {
            Some((name, contexts)) if name == export.name => contexts,
            _ => Vec::new(),
        };
        Negotiated {
            export,
            form: self.form,
            contexts,
            ack_durable: peer.ack_durable,
            answer: Vec::new(),
        }
    }
}

/// Opens an export. The empty name stands for the only one there is. With `quiesce`, nothing an
/// earlier connection sent takes effect after this.
async fn open(
    name: &str,
    peer: &Peer,
    exports: &dyn Exports,
    quiesce: bool,
) -> Result<ExportInfo, OpenError> {
    let only;
    let name = if name.is_empty() {
        let mut all = exports.list(peer).await;
        all.retain(|export| peer.may_open(group_of(&export.name)));
        match &mut all[..] {
            [one] => {
                only = std::mem::take(&mut one.name);
                &only
            }
            _ => return Err(OpenError::Unknown),
        }
    } else {
        name
    };
    if !peer.may_open(group_of(name)) {
        return Err(OpenError::Forbidden);
    }
    let export = exports.open(name, peer).await?;
    if quiesce {
        exports.quiesce(&export).await?;
    }
    Ok(export)
}

fn open_refused(error: OpenError) -> Refused {
    match error {
        OpenError::Unknown => refused(rep::ERR_UNKNOWN, "no such export"),
        OpenError::Forbidden => refused(rep::ERR_POLICY, "this client may not open it"),
        OpenError::Unavailable => refused(rep::ERR_SHUTDOWN, "not available at present"),
        OpenError::ShuttingDown => refused(rep::ERR_SHUTDOWN, "the server is shutting down"),
    }
}

/// The contexts an export has: number, kind, name.
fn contexts_of(export: &ExportInfo) -> impl Iterator<Item = (u32, ContextKind, &'static str)> {
    let dirty = (2, ContextKind::Dirty, CONTEXT_DIRTY);
    [(1, ContextKind::Allocation, CONTEXT_ALLOCATION)]
        .into_iter()
        .chain(export.has_dirty.then_some(dirty))
}

/// Whether one of the queries means the context. A namespace alone (`base:`), or no query at all,
/// means every context when listing and none when selecting.
fn matches_any(queries: &[&str], name: &str, set: bool) -> bool {
    let is_namespace = |query: &str| query.ends_with(':') && name.starts_with(query);
    (queries.is_empty() && !set)
        || queries
            .iter()
            .any(|query| *query == name || (!set && is_namespace(query)))
}
