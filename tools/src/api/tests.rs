use super::client::{Client, ClientError};
use super::*;
use crate::cli::values::Point;
use std::path::Path;
use std::sync::{Arc, Mutex};
use tokio::net::{TcpListener, UnixListener};

/// A daemon that knows one group and remembers what it was asked.
#[derive(Default)]
struct Scripted {
    asked: Mutex<Vec<String>>,
}

impl Scripted {
    fn answer<T: Send + 'static>(&self, what: String, group: &str, answer: T) -> Answer<'_, T> {
        self.asked.lock().expect("no panic").push(what);
        let known = group == "vm1";
        let missing = ApiError::NotFound(format!("group '{group}' is not known"));
        Box::pin(async move { if known { Ok(answer) } else { Err(missing) } })
    }
}

impl Control for Scripted {
    fn status<'a>(&'a self, group: Option<&'a str>) -> Answer<'a, StatusReport> {
        let report = StatusReport {
            version: "test".into(),
            ..StatusReport::default()
        };
        self.answer("status".into(), group.unwrap_or("vm1"), report)
    }
    fn checkpoint<'a>(
        &'a self,
        group: &'a str,
        label: Option<&'a str>,
        app: bool,
        steps: Option<UnboundedSender<StepInfo>>,
    ) -> Answer<'a, CheckpointDone> {
        for at_us in [1, 2] {
            let what = "seen".to_owned();
            let told = steps.as_ref().map(|all| all.send(StepInfo { at_us, what }));
            assert!(told.is_none_or(|sent| sent.is_ok()));
        }
        let done = CheckpointDone {
            lsn: 7,
            label: label.map(str::to_owned),
            ..CheckpointDone::default()
        };
        let app = if app { " app" } else { "" };
        self.answer(format!("checkpoint {label:?}{app}"), group, done)
    }
    fn verify<'a>(&'a self, group: &'a str) -> Answer<'a, VerifyStatus> {
        let begun = VerifyStatus {
            run: 9,
            ..VerifyStatus::default()
        };
        self.answer("verify".into(), group, begun)
    }
    fn points<'a>(&'a self, group: &'a str) -> Answer<'a, PointList> {
        self.answer("points".into(), group, PointList::default())
    }
    fn export<'a>(&'a self, group: &'a str, point: &'a str) -> Answer<'a, ExportInfo> {
        assert!(point.parse::<Point>().is_ok());
        self.answer(format!("export {point}"), group, ExportInfo::default())
    }
    fn exports(&self) -> Answer<'_, Vec<ExportInfo>> {
        self.answer("exports".into(), "vm1", Vec::new())
    }
    fn close_export<'a>(&'a self, name: &'a str) -> Answer<'a, ()> {
        self.answer(format!("close {name}"), "vm1", ())
    }
    fn detach<'a>(&'a self, group: &'a str) -> Answer<'a, Detached> {
        self.answer("detach".into(), group, Detached::default())
    }
    fn metrics(&self) -> Answer<'_, String> {
        self.answer("metrics".into(), "vm1", "# nothing\n".to_owned())
    }
}

async fn serving() -> (tempfile::TempDir, Client, Arc<Scripted>) {
    let folder = tempfile::tempdir().expect("folder");
    let socket = folder.path().join("api.sock");
    let listener = UnixListener::bind(&socket).expect("bind");
    let scripted = Arc::new(Scripted::default());
    let router = server::api(Arc::clone(&scripted) as Arc<dyn Control>);
    tokio::spawn(async move { axum::serve(listener, router).await });
    (folder, Client::new(&socket), scripted)
}

#[tokio::test]
async fn questions_reach_the_daemon_and_answers_come_back() {
    let (_folder, client, scripted) = serving().await;
    assert_eq!(client.status(None).await.expect("status").version, "test");
    let done = client
        .checkpoint("vm1", Some("before"))
        .await
        .expect("done");
    assert_eq!((done.lsn, done.label.as_deref()), (7, Some("before")));
    let mut steps = Vec::new();
    let done = client.app_checkpoint("vm1", None, |step| steps.push(step.at_us));
    assert_eq!(done.await.expect("done").lsn, 7);
    assert_eq!(steps, [1, 2]);
    client.points("vm1").await.expect("points");
    client.export("vm1", "-90s").await.expect("export");
    assert!(client.exports().await.expect("exports").is_empty());
    client.close_export("vm1-7").await.expect("close");
    client.detach("vm1").await.expect("detach");
    let asked = scripted.asked.lock().expect("no panic").join(",");
    assert_eq!(
        asked,
        "status,checkpoint Some(\"before\"),checkpoint None app,points,export -90s,exports,close vm1-7,detach"
    );
}

#[tokio::test]
async fn refusals_say_why() {
    let (_folder, client, scripted) = serving().await;
    for (result, says) in [
        (
            client.status(Some("vm2")).await.map(drop),
            "'vm2' is not known",
        ),
        (
            client.checkpoint("vm1", Some("latest")).await.map(drop),
            "label: ",
        ),
        (
            client.checkpoint("vm1", Some("../x")).await.map(drop),
            "label: ",
        ),
        (
            client.app_checkpoint("vm2", None, |_| ()).await.map(drop),
            "'vm2' is not known",
        ),
        (client.points("%2e%2e").await.map(drop), "group name: "),
        (
            client.export("a/b", "latest").await.map(drop),
            "group name: ",
        ),
        (
            client.export("vm1", "a b").await.map(drop),
            "is no recovery point",
        ),
    ] {
        let error = result.expect_err("refused");
        assert!(matches!(&error, ClientError::Refused(_)), "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
    assert_eq!(
        *scripted.asked.lock().expect("no panic"),
        ["status", "checkpoint None app"]
    );
}

#[tokio::test]
async fn no_daemon_is_said_plainly() {
    let error = Client::new(Path::new("/nonexistent/api.sock"))
        .status(None)
        .await
        .expect_err("nobody there");
    assert!(error.to_string().contains("is 'afterimage serve' running"));
}

#[tokio::test]
async fn the_metrics_port_answers_nothing_that_changes() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("bound");
    let router = server::metrics(Arc::new(Scripted::default()));
    tokio::spawn(async move { axum::serve(listener, router).await });
    for (path, status) in [
        ("GET /metrics", "200"),
        ("GET /healthz", "200"),
        ("GET /v1/status", "404"),
        ("POST /v1/groups/vm1/detach", "404"),
    ] {
        let mut stream = tokio::net::TcpStream::connect(address)
            .await
            .expect("connect");
        let request = format!("{path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("send");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answer");
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{path}: {answer}"
        );
    }
}
