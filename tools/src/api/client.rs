//! A client of the API's unix socket, for the commands.

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use super::types::{
    CheckpointDone, CheckpointLine, CheckpointRequest, Detached, ExportInfo, ExportRequest,
    Failure, PointList, StatusReport, StepInfo, VerifyStatus,
};

/// No answer is longer.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// A detach drains the log first; nothing else takes long.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(900);

/// Why a question got no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody there.
    #[error(
        "no daemon answers at {}: {source}; is 'afterimage serve' running, and is this the right --config?",
        socket.display()
    )]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The daemon refused.
    #[error("{0}")]
    Refused(String),
    /// The exchange broke.
    #[error("the daemon's answer broke off: {0}")]
    Http(#[from] hyper::Error),
    /// The answer is not what this version understands.
    #[error("the daemon's answer cannot be read (is it of another version?): {0}")]
    Answer(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Nothing came.
    #[error("the daemon did not answer within {} s", ANSWER_TIME_MAX.as_secs())]
    Slow,
    /// A detach takes longer.
    #[error("'{group}' is still being detached after {} s, and that goes on without this command: 'afterimage status {group}' shows it, 'afterimage detach {group}' waits for it again; its disks are not complete before", ANSWER_TIME_MAX.as_secs())]
    StillDetaching {
        /// The group.
        group: String,
    },
}

/// Asks the daemon behind one socket.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the daemon at `socket`.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// How all groups are, or one.
    ///
    /// # Errors
    /// As the variants of [`ClientError`] say; so for all methods.
    pub async fn status(&self, group: Option<&str>) -> Result<StatusReport, ClientError> {
        match group {
            Some(group) => self.get(&format!("/v1/groups/{group}")).await,
            None => self.get("/v1/status").await,
        }
    }

    /// Takes a checkpoint.
    ///
    /// # Errors
    /// See [`Client::status`].
    pub async fn checkpoint(
        &self,
        group: &str,
        label: Option<&str>,
    ) -> Result<CheckpointDone, ClientError> {
        let body = CheckpointRequest {
            label: label.map(str::to_owned),
            ..CheckpointRequest::default()
        };
        self.post(&format!("/v1/groups/{group}/checkpoints"), &body)
            .await
    }

    /// Takes a checkpoint with the guest frozen for a moment; `step` is called as things happen.
    ///
    /// # Errors
    /// See [`Client::status`].
    pub async fn app_checkpoint(
        &self,
        group: &str,
        label: Option<&str>,
        step: impl FnMut(&StepInfo),
    ) -> Result<CheckpointDone, ClientError> {
        tokio::time::timeout(ANSWER_TIME_MAX, self.stepwise(group, label, step))
            .await
            .unwrap_or(Err(ClientError::Slow))
    }

    async fn stepwise(
        &self,
        group: &str,
        label: Option<&str>,
        mut step: impl FnMut(&StepInfo),
    ) -> Result<CheckpointDone, ClientError> {
        let body = CheckpointRequest {
            label: label.map(str::to_owned),
            app: true,
            steps: true,
        };
        let path = format!("/v1/groups/{group}/checkpoints");
        let (response, connection) = self.send(Method::POST, &path, json(&body)?).await?;
        let status = response.status();
        let mut body = Limited::new(response.into_body(), ANSWER_BYTES_MAX);
        let mut received = Vec::new();
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame.map_err(ClientError::Answer)?.into_data() {
                received.extend_from_slice(&data);
            }
            while status.is_success()
                && let Some(end) = received.iter().position(|byte| *byte == b'\n')
            {
                let line: Vec<u8> = received.drain(..=end).collect();
                match parse(&line)? {
                    CheckpointLine::Step(happened) => step(&happened),
                    CheckpointLine::Done(done) => {
                        connection.abort();
                        return Ok(done);
                    }
                    CheckpointLine::Failed(why) => return Err(ClientError::Refused(why)),
                }
            }
        }
        match status.is_success() {
            true => Err(ClientError::Answer("it ends before the result".into())),
            false => Err(ClientError::Refused(refusal(status, &received))),
        }
    }

    /// Begins to compare a group's disks with what its targets hold; [`Client::status`] shows what
    /// comes of it.
    ///
    /// # Errors
    /// See [`Client::status`].
    pub async fn verify(&self, group: &str) -> Result<VerifyStatus, ClientError> {
        self.post(&format!("/v1/groups/{group}/verify"), &()).await
    }

    /// Recovery points at the daemon's own repository.
    ///
    /// # Errors
    /// See [`Client::status`].
    pub async fn points(&self, group: &str) -> Result<PointList, ClientError> {
        self.get(&format!("/v1/groups/{group}/points")).await
    }

    /// Exports an image.
    ///
    /// # Errors
    /// See [`Client::status`].
    pub async fn export(&self, group: &str, point: &str) -> Result<ExportInfo, ClientError> {
        let body = ExportRequest {
            group: group.to_owned(),
            point: point.to_owned(),
        };
        self.post("/v1/exports", &body).await
    }

    /// What is exported.
    ///
    /// # Errors
    /// See [`Client::status`].
    pub async fn exports(&self) -> Result<Vec<ExportInfo>, ClientError> {
        self.get("/v1/exports").await
    }

    /// Stops an export.
    ///
    /// # Errors
    /// See [`Client::status`].
    pub async fn close_export(&self, name: &str) -> Result<(), ClientError> {
        let path = format!("/v1/exports/{name}");
        self.exchange(Method::DELETE, &path, Bytes::new())
            .await
            .map(drop)
    }

    /// Detaches a group.
    ///
    /// # Errors
    /// See [`Client::status`].
    pub async fn detach(&self, group: &str) -> Result<Detached, ClientError> {
        let detached = self.post(&format!("/v1/groups/{group}/detach"), &()).await;
        detached.map_err(|error| match error {
            ClientError::Slow => ClientError::StillDetaching {
                group: group.to_owned(),
            },
            other => other,
        })
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        parse(&self.exchange(Method::GET, path, Bytes::new()).await?)
    }

    async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        parse(&self.exchange(Method::POST, path, json(body)?).await?)
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Bytes, ClientError> {
        tokio::time::timeout(ANSWER_TIME_MAX, self.exchange_slowly(method, path, body))
            .await
            .unwrap_or(Err(ClientError::Slow))
    }

    async fn exchange_slowly(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Bytes, ClientError> {
        let (response, connection) = self.send(method, path, body).await?;
        let status = response.status();
        let bytes = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
            .map_err(ClientError::Answer)?
            .to_bytes();
        connection.abort();
        if status.is_success() {
            return Ok(bytes);
        }
        Err(ClientError::Refused(refusal(status, &bytes)))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(Response<Incoming>, JoinHandle<hyper::Result<()>>), ClientError> {
        let stream =
            UnixStream::connect(&self.socket)
                .await
                .map_err(|source| ClientError::Connect {
                    socket: self.socket.clone(),
                    source,
                })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "afterimage")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|e| ClientError::Answer(e.into()))?;
        Ok((sender.send_request(request).await?, connection))
    }
}

fn json(body: &impl Serialize) -> Result<Bytes, ClientError> {
    let body = serde_json::to_vec(body).map_err(|e| ClientError::Answer(e.into()))?;
    Ok(body.into())
}

fn refusal(status: StatusCode, body: &[u8]) -> String {
    match serde_json::from_slice::<Failure>(body) {
        Ok(failure) => failure.error,
        Err(_) => format!("{status}: {}", String::from_utf8_lossy(body).trim()),
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(bytes).map_err(|e| ClientError::Answer(e.into()))
}
