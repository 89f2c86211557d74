//! Routes of the API and of the metrics port.

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use std::convert::Infallible;
use std::sync::Arc;
use tokio::sync::mpsc;

use super::types::{CheckpointLine, CheckpointRequest, ExportRequest, Failure, StatusReport};
use super::{ApiError, Control};
use crate::cli::values::{GroupName, Label, Point};

/// No request has a larger body.
const BODY_BYTES_MAX: usize = 64 << 10;

type Shared = Arc<dyn Control>;

/// Everything, for the unix socket.
pub fn api(control: Shared) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/groups/{group}", get(group_status))
        .route("/v1/groups/{group}/checkpoints", post(checkpoint))
        .route("/v1/groups/{group}/points", get(points))
        .route("/v1/groups/{group}/verify", post(verify))
        .route("/v1/groups/{group}/detach", post(detach))
        .route("/v1/exports", get(exports).post(export))
        .route("/v1/exports/{name}", delete(close_export))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(Arc::clone(&control))
        .merge(metrics(control))
}

/// Metrics and health, for loopback TCP.
pub fn metrics(control: Shared) -> Router {
    Router::new()
        .route("/metrics", get(metrics_text))
        .route("/healthz", get(health))
        .with_state(control)
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Invalid(_) => StatusCode::BAD_REQUEST,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let error = self.to_string();
        (status, Json(Failure { error })).into_response()
    }
}

fn valid_group(name: &str) -> Result<(), ApiError> {
    match name.parse::<GroupName>() {
        Ok(_) => Ok(()),
        Err(e) => Err(ApiError::Invalid(format!("group name: {e}"))),
    }
}

fn valid_point(point: &str) -> Result<(), ApiError> {
    match point.parse::<Point>() {
        Ok(_) => Ok(()),
        Err(e) => Err(ApiError::Invalid(e.to_string())),
    }
}

async fn status(State(control): State<Shared>) -> Result<Json<StatusReport>, ApiError> {
    control.status(None).await.map(Json)
}

async fn group_status(
    State(control): State<Shared>,
    Path(group): Path<String>,
) -> Result<Response, ApiError> {
    valid_group(&group)?;
    Ok(Json(control.status(Some(&group)).await?).into_response())
}

async fn checkpoint(
    State(control): State<Shared>,
    Path(group): Path<String>,
    Json(request): Json<CheckpointRequest>,
) -> Result<Response, ApiError> {
    valid_group(&group)?;
    if let Some(label) = &request.label {
        label
            .parse::<Label>()
            .map_err(|e| ApiError::Invalid(format!("label: {e}")))?;
    }
    if request.steps {
        return checkpoint_with_steps(control, group, request).await;
    }
    let done = control
        .checkpoint(&group, request.label.as_deref(), request.app, None)
        .await?;
    Ok(Json(done).into_response())
}

/// A line for each step as it happens. What is refused at once is refused as without steps.
async fn checkpoint_with_steps(
    control: Shared,
    group: String,
    request: CheckpointRequest,
) -> Result<Response, ApiError> {
    let (stepped, mut steps) = mpsc::unbounded_channel();
    let (lines, mut to_send) = mpsc::unbounded_channel();
    // It goes on although nobody listens any more, as the checkpoint itself does.
    tokio::spawn(async move {
        let label = request.label.as_deref();
        let mut done = control.checkpoint(&group, label, request.app, Some(stepped));
        let result = loop {
            tokio::select! {
                biased;
                Some(step) = steps.recv() => drop(lines.send(Ok(CheckpointLine::Step(step)))),
                result = &mut done => break result,
            }
        };
        lines.send(result.map(CheckpointLine::Done)).ok();
    });
    let first = to_send.recv().await.transpose()?;
    let rest = futures::stream::unfold((first, to_send), async |(line, mut to_send)| {
        let line = match line {
            Some(line) => line,
            None => match to_send.recv().await? {
                Ok(line) => line,
                Err(error) => CheckpointLine::Failed(error.to_string()),
            },
        };
        let mut bytes = serde_json::to_vec(&line).ok()?;
        bytes.push(b'\n');
        Some((Ok::<_, Infallible>(Bytes::from(bytes)), (None, to_send)))
    });
    let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
    Ok((kind, Body::from_stream(rest)).into_response())
}

async fn points(
    State(control): State<Shared>,
    Path(group): Path<String>,
) -> Result<Response, ApiError> {
    valid_group(&group)?;
    Ok(Json(control.points(&group).await?).into_response())
}

async fn verify(
    State(control): State<Shared>,
    Path(group): Path<String>,
) -> Result<Response, ApiError> {
    valid_group(&group)?;
    Ok(Json(control.verify(&group).await?).into_response())
}

async fn detach(
    State(control): State<Shared>,
    Path(group): Path<String>,
) -> Result<Response, ApiError> {
    valid_group(&group)?;
    Ok(Json(control.detach(&group).await?).into_response())
}

async fn exports(State(control): State<Shared>) -> Result<Response, ApiError> {
    Ok(Json(control.exports().await?).into_response())
}

async fn export(
    State(control): State<Shared>,
    Json(request): Json<ExportRequest>,
) -> Result<Response, ApiError> {
    valid_group(&request.group)?;
    valid_point(&request.point)?;
    let info = control.export(&request.group, &request.point).await?;
    Ok(Json(info).into_response())
}

async fn close_export(
    State(control): State<Shared>,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    control.close_export(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn metrics_text(State(control): State<Shared>) -> Result<Response, ApiError> {
    let text = control.metrics().await?;
    let kind = [(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)];
    Ok((kind, text).into_response())
}

async fn health() -> &'static str {
    "ok\n"
}
