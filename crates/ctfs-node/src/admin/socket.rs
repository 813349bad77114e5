//! The daemon's end of the admin socket.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, watch},
    task::JoinSet,
    time::timeout,
};

use super::{AdminHandler, Answer, LINE_BYTES_MAX, Request, short_path};
use crate::problem::{Code, Problem};

/// Connections served at a time; more wait in the listen queue. Each may hold [`LINE_BYTES_MAX`].
const CONNECTIONS_MAX: usize = 16;
/// A local program sends its one line at once.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);
/// The longest a verb may take: a flush of a full cache tier over a slow line.
const HANDLE_DEADLINE: Duration = Duration::from_secs(900);
/// A program that does not read its answer is let go.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);
/// How long open connections may finish after the daemon was told to end.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// A bound socket. Removes its file when dropped.
pub struct AdminSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl AdminSocket {
    /// Binds `path` with mode 0600, replacing what an earlier daemon left.
    ///
    /// The caller holds the lock of the state directory, so no living daemon owns the old file;
    /// the directory is 0700, so nobody else connects before the mode is set.
    pub fn bind(path: &Path) -> io::Result<Self> {
        match fs::remove_file(path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let (short, _dir) = short_path(path)?;
        let listener = UnixListener::bind(short)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Answers until `shutdown` turns true or its sender is gone; then lets open connections finish.
    pub async fn serve(self, handler: Arc<dyn AdminHandler>, mut shutdown: watch::Receiver<bool>) {
        let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut open = JoinSet::new();
        loop {
            let slot = tokio::select! {
                _ = shutdown.wait_for(|stop| *stop) => break,
                slot = slots.clone().acquire_owned() => slot.expect("the semaphore is never closed"),
            };
            let stream = tokio::select! {
                _ = shutdown.wait_for(|stop| *stop) => break,
                accepted = self.listener.accept() => accepted,
            };
            let stream = match stream {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: accepting again at once would spin.
                    tracing::warn!(%error, "cannot accept an admin connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let handler = handler.clone();
            open.spawn(async move {
                connection(stream, handler).await;
                drop(slot);
            });
            while open.try_join_next().is_some() {}
        }
        // New programs should see "not running" rather than wait in the queue of a dying daemon.
        drop(self);
        if timeout(DRAIN_DEADLINE, async { while open.join_next().await.is_some() {} }).await.is_err() {
            tracing::warn!("an admin connection did not finish in time");
        }
    }
}

impl Drop for AdminSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Binds `path` and serves it: [`AdminSocket::bind`], then [`AdminSocket::serve`].
pub async fn serve(path: &Path, handler: Arc<dyn AdminHandler>, shutdown: watch::Receiver<bool>) -> io::Result<()> {
    AdminSocket::bind(path)?.serve(handler, shutdown).await;
    Ok(())
}

async fn connection(mut stream: UnixStream, handler: Arc<dyn AdminHandler>) {
    if let Err(why) = authorized(&stream) {
        tracing::warn!(why, "refused an admin connection");
        return;
    }
    let answer = match timeout(REQUEST_DEADLINE, request(&mut stream)).await {
        Ok(Ok(request)) => {
            tracing::debug!(?request, "admin request");
            match timeout(HANDLE_DEADLINE, handler.handle(request)).await {
                Ok(result) => Answer::from(result),
                Err(_) => Answer::Problem(Problem::new(Code::TimedOut, "the daemon did not finish in time").try_next("ctfs status")),
            }
        }
        Ok(Err(problem)) => Answer::Problem(problem),
        Err(_) => return,
    };
    let line = encode(&answer);
    match timeout(ANSWER_DEADLINE, async {
        stream.write_all(&line).await?;
        stream.shutdown().await
    })
    .await
    {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "the program left before its answer"),
        Err(_) => tracing::debug!("the program did not read its answer"),
    }
}

/// Root and the daemon's own user may ask; the mode of the socket says the same, this holds even
/// where someone widened it.
fn authorized(stream: &UnixStream) -> Result<(), String> {
    let peer = stream.peer_cred().map_err(|error| error.to_string())?;
    let own = rustix::process::geteuid().as_raw();
    if peer.uid() == 0 || peer.uid() == own { Ok(()) } else { Err(format!("uid {} is neither root nor {own}", peer.uid())) }
}

async fn request(stream: &mut UnixStream) -> Result<Request, Problem> {
    let bad = |why: String| Problem::new(Code::VersionsDiffer, "the daemon does not understand the request").why(why).try_next("ctfs version");
    let mut line = Vec::new();
    let mut piece = [0; 4096];
    while !line.contains(&b'\n') {
        let read = stream.read(&mut piece).await.map_err(|error| bad(error.to_string()))?;
        if read == 0 {
            break;
        }
        line.extend_from_slice(&piece[..read]);
        if line.len() > LINE_BYTES_MAX {
            return Err(bad(format!("it is longer than {LINE_BYTES_MAX} bytes")));
        }
    }
    serde_json::from_slice(line.split(|&b| b == b'\n').next().unwrap_or_default()).map_err(|error| bad(error.to_string()))
}

fn encode(answer: &Answer) -> Vec<u8> {
    let internal = |why: &str| serde_json::to_vec(&Answer::Problem(Problem::internal(why))).unwrap_or_default();
    let mut line = serde_json::to_vec(answer).unwrap_or_else(|error| internal(&error.to_string()));
    if line.len() >= LINE_BYTES_MAX {
        line = internal("the answer is too long");
    }
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::admin::{AdminClient, ClientError, DoneReport, Response};

    struct Echo;

    #[async_trait::async_trait]
    impl AdminHandler for Echo {
        async fn handle(&self, request: Request) -> Result<Response, Problem> {
            match request {
                Request::NodeRemove { name, .. } => Err(Problem::no_such_server(&name)),
                Request::Nodes => Ok(Response::Done(DoneReport { message: "x".repeat(LINE_BYTES_MAX), notes: vec![] })),
                other => Ok(Response::Done(DoneReport { message: format!("{other:?}"), notes: vec![] })),
            }
        }
    }

    /// Serves in a state directory while `talk` runs on a blocking thread.
    async fn with_daemon(state: &Path, talk: impl FnOnce(&Path) + Send + 'static) {
        let (stop, stopped) = watch::channel(false);
        let socket = AdminSocket::bind(&state.join(super::super::SOCKET_NAME)).unwrap();
        let serving = tokio::spawn(socket.serve(Arc::new(Echo), stopped));
        let owned = state.to_owned();
        tokio::task::spawn_blocking(move || talk(&owned)).await.unwrap();
        stop.send(true).unwrap();
        serving.await.unwrap();
    }

    const DEADLINE: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn a_request_is_answered_and_a_refusal_keeps_its_shape() {
        let dir = tempfile::tempdir().unwrap();
        with_daemon(dir.path(), |state| {
            let Ok(Response::Done(done)) = AdminClient::call(state, &Request::CacheDrop, DEADLINE) else { panic!() };
            assert_eq!(done.message, "CacheDrop");
            match AdminClient::call(state, &Request::NodeRemove { name: "x".into(), force: false }, DEADLINE) {
                Err(ClientError::Problem(problem)) => assert_eq!(problem, Problem::no_such_server("x")),
                other => panic!("{other:?}"),
            }
        })
        .await;
    }

    #[tokio::test]
    async fn the_socket_is_private_and_gone_after_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        with_daemon(dir.path(), |state| {
            let mode = fs::metadata(state.join("admin.sock")).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        })
        .await;
        assert!(!dir.path().join("admin.sock").exists());
        assert!(matches!(AdminClient::call(dir.path(), &Request::Ping, DEADLINE), Err(ClientError::NotRunning)));
    }

    #[tokio::test]
    async fn a_socket_left_by_a_dead_daemon_means_not_running_and_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        drop(std::os::unix::net::UnixListener::bind(dir.path().join("admin.sock")).unwrap());
        assert!(matches!(AdminClient::call(dir.path(), &Request::Ping, DEADLINE), Err(ClientError::NotRunning)));
        with_daemon(dir.path(), |state| {
            AdminClient::call(state, &Request::Ping, DEADLINE).unwrap();
        })
        .await;
    }

    #[tokio::test]
    async fn a_state_directory_with_a_very_long_path_works() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("d".repeat(120));
        fs::create_dir(&long).unwrap();
        with_daemon(&long, |state| {
            AdminClient::call(state, &Request::Ping, DEADLINE).unwrap();
        })
        .await;
        assert!(!long.join("admin.sock").exists());
    }

    #[tokio::test]
    async fn nonsense_and_endless_lines_get_a_problem_not_a_panic() {
        let dir = tempfile::tempdir().unwrap();
        with_daemon(dir.path(), |state| {
            for line in [&b"{\"verb\":\"fly\"}\n"[..], b"\xff\xfe\n", b"[[[[[[\n", b"\n", &vec![b'a'; LINE_BYTES_MAX + 4096]] {
                let mut stream = std::os::unix::net::UnixStream::connect(state.join("admin.sock")).unwrap();
                let _ = stream.write_all(line);
                let mut answer = String::new();
                let _ = stream.read_to_string(&mut answer);
                // An endless line may be cut off before the answer is read.
                assert!(answer.contains("E0130") || line.len() > LINE_BYTES_MAX, "{answer}");
            }
            let answer = AdminClient::call(state, &Request::Nodes, DEADLINE);
            assert!(matches!(answer, Err(ClientError::Problem(problem)) if problem.is(Code::Internal)));
        })
        .await;
    }
}
