//! What programs do on a server: a few calls each, written down in the history.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use ctfs_meta::MetaError;
use ctfs_types::{Attr, Ino};
use ctfs_vfs::{Caller, FsError, HandleId, LockRequest, Metadata as _, SetAttrRequest};

use crate::{
    history::History,
    invariants::{appends, attributes, fsync, linearizable::{Calls, Model}, locks, names},
    server::Server,
};

/// Longest file that is read.
const READ_BYTES: u32 = 1 << 20;

/// Whether a program waits until what it did, or saw, is in the log before it believes in it. Without
/// that a crash may take it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Care {
    Synced,
    Unsynced,
}

impl Server {
    fn history<T>(&self, with: impl FnOnce(&mut History) -> T) -> T {
        with(&mut self.shared.history.lock())
    }

    async fn cared(&self, care: Care) -> Result<(), FsError> {
        match care {
            Care::Synced => self.metadata.settled().await,
            Care::Unsynced => Ok(()),
        }
    }

    /// # Errors
    /// As [`ctfs_vfs::Vfs::create`].
    pub async fn make(&self, dir: Ino, name: &str, mode: u16) -> Result<Attr, FsError> {
        let _locked = self.kernel.lock_directory(dir).await;
        let _changing = self.kernel.changes_name(dir, name.as_bytes());
        let made = self.vfs.create(Caller::ROOT, dir, name.as_bytes(), u32::from(mode), 0, libc::O_RDWR | libc::O_EXCL).await;
        match made {
            Ok((attr, opened)) => {
                let _ = self.vfs.flush(attr.ino, opened.handle, 0).await;
                self.vfs.release(opened.handle).await;
                Ok(attr)
            }
            Err(error) => Err(error),
        }
    }

    /// # Errors
    /// As [`ctfs_vfs::Vfs::mkdir`].
    pub async fn make_dir(&self, dir: Ino, name: &str) -> Result<Ino, FsError> {
        let _locked = self.kernel.lock_directory(dir).await;
        let _changing = self.kernel.changes_name(dir, name.as_bytes());
        self.vfs.mkdir(Caller::ROOT, dir, name.as_bytes(), 0o755, 0).await.map(|attr| attr.ino)
    }

    /// # Errors
    /// As [`ctfs_vfs::Vfs::unlink`].
    pub async fn remove(&self, dir: Ino, name: &str) -> Result<(), FsError> {
        let _locked = self.kernel.lock_directory(dir).await;
        let _changing = self.kernel.changes_name(dir, name.as_bytes());
        self.vfs.unlink(dir, name.as_bytes()).await
    }

    /// # Errors
    /// As [`ctfs_vfs::Vfs::setattr`].
    pub async fn set_mode(&self, ino: Ino, mode: u16) -> Result<(), FsError> {
        let request = SetAttrRequest { mode: Some(u32::from(mode)), ..SetAttrRequest::default() };
        let _changing = self.kernel.changes_inode(ino);
        self.vfs.setattr(Caller::ROOT, ino, request).await.map(drop)
    }

    /// Reads all of a file as a program would that opens it now.
    ///
    /// # Errors
    /// As the calls it takes.
    pub async fn read(&self, ino: Ino, care: Care) -> Result<Bytes, FsError> {
        let opened = self.vfs.open(Caller::ROOT, ino, libc::O_RDONLY).await?;
        let handle = opened.handle;
        let read = async {
            let bytes = self.kernel.read(ino, opened, READ_BYTES).await?;
            if care == Care::Synced {
                // What was read may have been written here and not be durable.
                self.vfs.fsync(ino, handle).await?;
            }
            Ok(bytes)
        }
        .await;
        self.vfs.release(handle).await;
        read
    }

    /// Opens a file with `flags`, writes, and syncs if asked to.
    ///
    /// # Errors
    /// As the calls it takes; what was written may be there or not.
    pub async fn write(&self, ino: Ino, flags: i32, bytes: Vec<u8>, sync: bool) -> Result<(), FsError> {
        let handle = self.vfs.open(Caller::ROOT, ino, flags).await?.handle;
        let written = self.write_with(ino, handle, 0, bytes, sync).await;
        let flushed = self.vfs.flush(ino, handle, 0).await;
        self.vfs.release(handle).await;
        written.and(flushed)
    }

    /// # Errors
    /// As [`Self::write`].
    pub async fn write_with(&self, ino: Ino, handle: HandleId, offset: u64, bytes: Vec<u8>, sync: bool) -> Result<(), FsError> {
        let len = bytes.len() as u32;
        let written = {
            let _changing = self.kernel.changes_inode(ino);
            self.vfs.write(Caller::ROOT, ino, handle, offset, bytes.into(), false, false).await?
        };
        if written != len {
            return Err(FsError::CacheFull);
        }
        if sync { self.vfs.fsync(ino, handle).await } else { Ok(()) }
    }
}

/// Two names, each in a directory.
pub type NamePair = [(Ino, &'static str); 2];

/// Asks something of a pair of names.
pub async fn ask_names(server: &Arc<Server>, object: u64, pair: NamePair, action: names::Action, care: Care) {
    use names::{Action, Answer};
    let Some(call) = begin(server, |history| history.names.entry(object).or_default(), action) else { return };
    let is_read = matches!(action, Action::Look { .. });
    let answered = match action {
        Action::Make { name, tag } => server.make(pair[name].0, pair[name].1, tag).await.map(|_| Answer::Done),
        Action::Remove { name } => server.remove(pair[name].0, pair[name].1).await.map(|()| Answer::Done),
        Action::Rename { from, to } => {
            let ((from, name), (to, new_name)) = (pair[from], pair[to]);
            let _changing = [server.kernel.changes_name(from, name.as_bytes()), server.kernel.changes_name(to, new_name.as_bytes())];
            server.vfs.rename(from, name.as_bytes(), to, new_name.as_bytes(), 0).await.map(|()| Answer::Done)
        }
        Action::Look { name } => {
            let found = server.kernel.lookup(pair[name].0, pair[name].1.as_bytes()).await;
            found.map(|attr| Answer::Leads(attr.map(|attr| attr.mode & 0o777)))
        }
    };
    let answered = match answered {
        Err(FsError::Meta(MetaError::Exists { .. })) => Ok(Answer::Exists),
        Err(FsError::Meta(MetaError::NoSuchEntry { .. })) => Ok(Answer::NoEntry),
        other => other,
    };
    let answered = match answered {
        Ok(answer) => server.cared(care).await.map(|()| answer),
        refused => refused,
    };
    end(server, |history| history.names.entry(object).or_default(), call, answered, is_read, "names", object);
}

/// chmod, or stat through the kernel.
pub async fn ask_attributes(server: &Arc<Server>, object: u64, ino: Ino, set: Option<u16>, care: Care) {
    use attributes::{Action, Answer};
    let action = set.map_or(Action::Get, Action::Set);
    let Some(call) = begin(server, |history| history.attributes.entry(object).or_default(), action) else { return };
    let answered = match set {
        Some(mode) => server.set_mode(ino, mode).await.map(|()| Answer::Done),
        None => server.kernel.stat(ino).await.map(|attr| Answer::Is(attr.mode & 0o777)),
    };
    let answered = match answered {
        Ok(answer) => server.cared(care).await.map(|()| answer),
        refused => refused,
    };
    end(server, |history| history.attributes.entry(object).or_default(), call, answered, set.is_none(), "attributes", object);
}

/// Appends a piece and syncs it, or reads all of them.
pub async fn ask_appends(server: &Arc<Server>, object: u64, ino: Ino, piece: Option<u16>) {
    use appends::{Action, Answer};
    let action = piece.map_or(Action::Read, Action::Append);
    let Some(call) = begin(server, |history| history.appends.entry(object).or_default(), action) else { return };
    let answered = match piece {
        Some(piece) => {
            let flags = libc::O_WRONLY | libc::O_APPEND;
            server.write(ino, flags, appends::piece(piece), true).await.map(|()| Answer::Done)
        }
        None => match server.read(ino, Care::Synced).await {
            Ok(bytes) => match appends::pieces(&bytes) {
                Ok(pieces) => Ok(Answer::Holds(pieces)),
                Err(why) => {
                    let now = server.shared.now();
                    server.history(|history| history.violation(now, format!("s{} reads {why}", server.node.0)));
                    return;
                }
            },
            Err(error) => Err(error),
        },
    };
    end(server, |history| history.appends.entry(object).or_default(), call, answered, piece.is_none(), "appends", object);
    if piece.is_none() {
        server.history(|history| history.appends.entry(object).or_default().drop_unsure(call.call));
    }
}

/// Tries to take the lock of a file, holds it for a moment, and gives it back.
pub async fn use_lock(server: &Arc<Server>, object: u64, ino: Ino, owner: u64, held_for: Duration) {
    use locks::{Action, Answer, Owner};
    let Ok(opened) = server.vfs.open(Caller::ROOT, ino, libc::O_RDWR).await else { return };
    let me = Owner { life: server.consensus.incarnation().0, program: owner };
    let request = LockRequest { owner, exclusive: true, start: 0, end: u64::MAX, pid: 1 };
    if let Some(call) = begin(server, |history| history.locks.entry(object).or_default(), Action::Try(me)) {
        let answered = match server.vfs.setlk(ino, opened.handle, request, false, 0).await {
            Ok(()) => Ok(Answer::Done),
            Err(FsError::Meta(MetaError::Locked { .. })) => Ok(Answer::Busy),
            Err(error) => Err(error),
        };
        let has_it = matches!(answered, Ok(Answer::Done));
        let is_doubtful = answered.is_err();
        end(server, |history| history.locks.entry(object).or_default(), call, answered, false, "locks", object);
        if has_it {
            tokio::time::sleep(held_for).await;
        }
        if has_it || is_doubtful {
            // What may have come of a doubtful one is given back at any time.
            let unlock = begin(server, |history| history.locks.entry(object).or_default(), Action::Unlock(me));
            if has_it {
                let unlocked = server.vfs.unlock(ino, request).await.map(|()| Answer::Done);
                if let Some(call) = unlock {
                    end(server, |history| history.locks.entry(object).or_default(), call, unlocked, false, "locks", object);
                }
            }
        }
    }
    server.vfs.release(opened.handle).await;
}

/// Makes names in their order in a directory of its own until something fails, and syncs now and then.
pub async fn make_in_order(server: &Arc<Server>, dir: Ino, until: Duration) {
    let life = server.consensus.incarnation();
    let mut number = 0;
    server.history(|history| history.sequences.begin(dir, life));
    while server.shared.now() < until {
        server.history(|history| history.sequences.of(dir).asked = number + 1);
        if server.make(dir, &number.to_string(), 0o600).await.is_err() {
            return;
        }
        number += 1;
        server.history(|history| history.sequences.of(dir).answered = number);
        if server.shared.draw(|chance| chance.strikes(250)) {
            let Ok(handle) = server.vfs.opendir(dir).await else { return };
            let synced = server.vfs.fsyncdir(dir, handle).await;
            server.vfs.releasedir(handle).await;
            if synced.is_err() {
                return;
            }
            server.note(format_args!("{number} names in {dir} are synced"));
            server.history(|history| history.sequences.of(dir).synced = number);
        }
        let pause = server.shared.draw(|chance| chance.between(3, 120));
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}

/// Writes version after version into a file of its own until something fails, and syncs now and then.
pub async fn overwrite(server: &Arc<Server>, ino: Ino, until: Duration) {
    let mut version = 0;
    server.history(|history| history.versions.0.entry(ino).or_default().asked = 0);
    let Ok(opened) = server.vfs.open(Caller::ROOT, ino, libc::O_RDWR).await else { return };
    while server.shared.now() < until {
        version += 1;
        server.history(|history| history.versions.0.entry(ino).or_default().asked = version);
        let sync = server.shared.draw(|chance| chance.strikes(300));
        if server.write_with(ino, opened.handle, 0, fsync::content(version), sync).await.is_err() {
            break;
        }
        if sync {
            server.note(format_args!("version {version} of {ino} is synced"));
            server.history(|history| history.versions.0.entry(ino).or_default().synced = version);
        }
        let pause = server.shared.draw(|chance| chance.between(2, 150));
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    server.vfs.release(opened.handle).await;
}

/// A call that has begun.
#[derive(Clone, Copy)]
struct Begun {
    call: usize,
    /// Reads that the server had answered from the past.
    stale_reads: u64,
}

fn begin<M: Model>(
    server: &Server,
    of: impl FnOnce(&mut History) -> &mut Calls<M>,
    action: M::Action,
) -> Option<Begun> {
    let now = server.shared.now();
    let stale_reads = server.vfs.stale_reads();
    let mut history = server.shared.history.lock();
    let calls = of(&mut history);
    calls.has_room().then(|| Begun { call: calls.begin(now, server.node.0, action), stale_reads })
}

fn end<M: Model>(
    server: &Server,
    of: impl FnOnce(&mut History) -> &mut Calls<M>,
    Begun { call, stale_reads }: Begun,
    answered: Result<M::Answer, FsError>,
    is_read: bool,
    what: &str,
    object: u64,
) {
    let is_past = is_read && server.vfs.stale_reads() != stale_reads;
    match &answered {
        Ok(answer) if is_past => server.note(format_args!("{what} {object} #{call}: {answer:?} of the past")),
        Ok(answer) => server.note(format_args!("{what} {object} #{call}: {answer:?}")),
        Err(error) => server.note(format_args!("{what} {object} #{call}: {error}")),
    }
    let now = server.shared.now();
    let mut history = server.shared.history.lock();
    let calls = of(&mut history);
    match answered {
        // It says nothing of the present, and is counted as such.
        Ok(_) if is_past => calls.drop_call(call),
        Ok(answer) => calls.end(now, call, answer),
        Err(_) if is_read => calls.drop_call(call),
        // It may have happened, or happen yet.
        Err(_) => {}
    }
}
