//! Nothing is told before every server shows it.

use std::time::Duration;

use ctfs_types::{FileName, LogIndex};
use tokio::{sync::watch, task::JoinHandle, time::timeout};

use super::*;

/// A third server, of which it is known up to where it has applied.
fn third(world: &World) -> watch::Sender<LogIndex> {
    let told = watch::Sender::new(LogIndex(0));
    world.cluster.wait_for(told.subscribe());
    told
}

fn catch_up(third: &watch::Sender<LogIndex>) {
    third.send_replace(LogIndex(u64::MAX));
}

/// Returns when so many questions wait for something to become visible.
async fn waiting(world: &World, questions: usize) {
    let mut waiting = world.cluster.waiting.subscribe();
    waiting.wait_for(|waiting| *waiting >= questions).await.unwrap();
}

fn spawn<T: Send + 'static>(question: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    tokio::spawn(question)
}

#[tokio::test]
async fn a_server_that_has_applied_tells_nothing_that_another_has_not() {
    let world = World::new(2);
    let (writer, reader) = (world.vfs(0).clone(), world.vfs(1).clone());
    let dir = writer.mkdir(Caller::ROOT, ROOT, b"d", 0o755, 0).await.unwrap().ino;
    let old = file(&writer, dir, "old", b"bytes").await.ino;
    let gate = third(&world);

    let made = spawn({
        let writer = writer.clone();
        async move { writer.mkdir(Caller::ROOT, dir, b"new", 0o700, 0).await }
    });
    while reader.is_name_gone(dir, &FileName::new(b"new").unwrap()) {
        tokio::task::yield_now().await;
    }
    let ask = |name: &'static [u8]| {
        let reader = reader.clone();
        spawn(async move { reader.lookup(dir, name).await })
    };
    let list = spawn({
        let reader = reader.clone();
        async move { reader.readdir(dir, 0, 10, true).await }
    });
    let (new, stat) = (ask(b"new"), spawn({
        let reader = reader.clone();
        async move { reader.getattr(dir).await }
    }));
    waiting(&world, 3).await;
    // What did not change is told at once.
    assert_eq!(ask(b"old").await.unwrap().unwrap().ino, old);
    assert!(ask(b"none").await.unwrap().is_err());
    assert_eq!(reader.getattr(old).await.unwrap().size, 5);
    assert!(!new.is_finished() && !list.is_finished() && !stat.is_finished() && !made.is_finished());

    catch_up(&gate);
    let made = made.await.unwrap().unwrap();
    assert_eq!(new.await.unwrap().unwrap().ino, made.ino);
    assert_eq!(list.await.unwrap().unwrap().len(), 4);
    assert_eq!(stat.await.unwrap().unwrap().nlink, 3);
}

#[tokio::test]
async fn bytes_that_not_every_server_shows_are_not_read() {
    let world = World::new(2);
    let (writer, reader) = (world.vfs(0).clone(), world.vfs(1).clone());
    let ino = file(&writer, ROOT, "f", b"old").await.ino;
    // Shared, so that a write is a command.
    let handles = (open(&writer, ino, libc::O_RDWR).await, open(&reader, ino, libc::O_RDWR).await);
    write(&writer, ino, handles.0, 0, b"old").await;
    assert_eq!(read(&reader, ino, handles.1).await, b"old");
    let gate = third(&world);

    let version = world.version(ino);
    let written = spawn({
        let writer = writer.clone();
        async move { write(&writer, ino, handles.0, 0, b"new").await }
    });
    while world.version(ino) == version {
        tokio::task::yield_now().await;
    }
    let question = spawn({
        let reader = reader.clone();
        async move { read(&reader, ino, handles.1).await }
    });
    waiting(&world, 1).await;
    assert!(!question.is_finished() && !written.is_finished());
    catch_up(&gate);
    assert_eq!(timeout(Duration::from_secs(30), question).await.unwrap().unwrap(), b"new");
    written.await.unwrap();
}
