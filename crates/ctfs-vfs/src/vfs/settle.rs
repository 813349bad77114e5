//! A state of the metadata that has all that was done, on whichever server.
//!
//! What servers hold is ahead of the log, and what they wrote is in their journals: who takes the metadata at some
//! index as they are misses work that was finished, and even synced, before. So a state that shall have it is one
//! that comes after every life that may hold anything was asked, and has put all of that into the metadata; or was
//! ended, and all that it left was sent.

use std::time::Duration;

use ctfs_types::{
    Holder, LogIndex,
    rules::{Rule, keeps},
};
use futures_util::future::try_join_all;
use tokio::time::{Instant, sleep};
use tracing::debug;

use super::Vfs;
use crate::FsError;

/// How long the others may take together: each may have much to write back. One that does not answer is waited for
/// until its life is ended.
const PATIENCE: Duration = Duration::from_secs(600);
/// Before a server that did not answer is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(300);

impl Vfs {
    /// Puts all that programs of this server did before the call into the metadata, bytes in chunks too.
    ///
    /// # Errors
    /// Something was not flushed: it stays, and nobody else is told; [`FsError::NoQuorum`].
    pub async fn settle_here(&self) -> Result<(), FsError> {
        self.content.flush_all_quietly().await?;
        self.meta.settled().await
    }

    /// The same of every server. Answers an index of the log up to which the metadata have it, here too.
    ///
    /// # Errors
    /// As [`Self::settle_here`]; [`FsError::HolderAway`]: some life neither did so in time nor was ended.
    pub async fn settle_everywhere(&self) -> Result<LogIndex, FsError> {
        self.settle_here().await?;
        self.meta.barrier().await?;
        if keeps(Rule::SettlingAsksHolders) {
            // A life that is reported from here on has done nothing before. This server's own may be an earlier one.
            let members = self.meta.replica().read().members()?;
            let lives = members.iter().map(|member| Holder { node: member.node, incarnation: member.incarnation });
            let deadline = Instant::now() + PATIENCE;
            try_join_all(lives.map(|life| self.settle_life(life, deadline))).await?;
        }
        Ok(self.meta.replica().read().applied())
    }

    async fn settle_life(&self, life: Holder, deadline: Instant) -> Result<(), FsError> {
        loop {
            let settled = if life == self.meta.holder() { Ok(()) } else { self.holders.settle(life).await };
            self.meta.barrier().await?;
            let (is_ended, has_left) = {
                let replica = self.meta.replica().read();
                (replica.is_ended(life.incarnation)?, replica.left_by(life.incarnation)?)
            };
            let why = match settled {
                // A server that has not heard of the end of its life says that there is nothing.
                _ if has_left => "what it left when its life was ended is not all sent yet".to_owned(),
                Ok(()) => return Ok(()),
                Err(_) if is_ended => return Ok(()),
                Err(error) => error.to_string(),
            };
            debug!(node = %life.node, why, "a server has not put what it did into the metadata");
            if Instant::now() >= deadline {
                return Err(FsError::HolderAway { node: life.node, why });
            }
            sleep(ASK_AGAIN).await;
        }
    }
}
