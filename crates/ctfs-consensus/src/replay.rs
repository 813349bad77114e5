//! What a life of a server left in its journal, sent by others.
//!
//! Commands that happened there and may not be in the log wait in the journal of that life. Before a new
//! life of the same server is reported, which ends the old one, they are sent in their order, under the
//! requests they had: those that the log has already are answered from the table of verdicts and change
//! nothing. When a server is lost, its pair does the same.

use std::{sync::atomic::Ordering::Relaxed, time::SystemTime};

use ctfs_meta::{About, Command, MetaError, Op, Reply, SEQ_LEFT};
use ctfs_types::{Holder, Incarnation, RequestId, Timestamp};
use tokio::time::{Instant, sleep};

use crate::{
    core::Core,
    error::ProposeError,
    proposer::{Outcome, encoded_bytes},
};

/// Before commands are sent again that found no answer.
const TRY_AGAIN: std::time::Duration = std::time::Duration::from_millis(50);

/// What became of commands that were sent again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Replayed {
    /// In the log now, or before.
    pub happened: u64,
    /// Refused, because that life was ended before.
    pub lost: u64,
}

/// Where this server begins to count requests in the name of others: past those that it or another one
/// counted before, or else they would be answered as those.
pub(crate) fn first_seq() -> u64 {
    let now = Timestamp::from(SystemTime::now());
    SEQ_LEFT + u64::try_from(now.secs).unwrap_or(0) * 1_000_000 + u64::from(now.nanos / 1000)
}

impl Core {
    /// Sends commands that a life left. All of them are decided when this answers. `by` is the life that sends them,
    /// one and the same for all that was left: what the log takes of a later one says that it has all before.
    ///
    /// # Errors
    /// [`ProposeError::NoQuorum`], [`ProposeError::Stopped`]: from some command on none is decided; send
    /// all of them again later.
    pub async fn replay(&self, by: Holder, mut commands: Vec<Command>) -> Result<Replayed, ProposeError> {
        let limits = &self.settings.limits;
        let mut replayed = Replayed::default();
        commands.iter_mut().for_each(|command| command.about = About::Left { by });
        let mut rest = &commands[..];
        while !rest.is_empty() {
            let (mut count, mut bytes) = (0, 0);
            for command in rest.iter().take(limits.entry_commands) {
                let more = encoded_bytes(command);
                if count > 0 && bytes + more > limits.entry_bytes {
                    break;
                }
                (count, bytes) = (count + 1, bytes + more);
            }
            let (batch, later) = rest.split_at(count);
            for verdict in self.send_left(batch, bytes).await? {
                match verdict {
                    Ok(_) | Err(MetaError::Answered) => replayed.happened += 1,
                    Err(why) => {
                        tracing::warn!(%why, "a change of a life that has ended is lost");
                        replayed.lost += 1;
                    }
                }
            }
            rest = later;
        }
        Ok(replayed)
    }

    /// Sends one command in the name of a life that has ended.
    ///
    /// # Errors
    /// As [`Self::replay`]; it may have happened.
    pub async fn propose_left(&self, by: Holder, life: Incarnation, op: Op) -> Result<Result<Reply, MetaError>, ProposeError> {
        let request = RequestId { client: life.0, seq: self.left_seq.fetch_add(1, Relaxed) };
        let about = About::Left { by };
        let command = Command { request, answered: 0, at: Timestamp::from(SystemTime::now()), about, op };
        let bytes = encoded_bytes(&command);
        let mut verdicts = self.send_left(&[command], bytes).await?;
        Ok(verdicts.pop().expect("a ticket is answered command by command"))
    }

    async fn send_left(&self, batch: &[Command], bytes: usize) -> Result<Vec<Result<Reply, MetaError>>, ProposeError> {
        let started = Instant::now();
        let deadline = started + self.settings.timings.propose_deadline;
        while Instant::now() < deadline {
            if let Some(stopped) = self.stopped() {
                return Err(stopped);
            }
            let leader = self.leader();
            let Some(to) = leader else {
                self.await_other_leader(leader, deadline).await;
                continue;
            };
            match self.attempt(to, batch.to_vec(), bytes, deadline).await {
                Outcome::Answered(answer) => {
                    if !self.await_applied(answer.index, deadline).await {
                        break;
                    }
                    return Ok(answer.verdicts);
                }
                Outcome::NoSpace => return Err(ProposeError::NoSpace),
                Outcome::NotLeader | Outcome::Unsure => sleep(TRY_AGAIN).await,
            }
        }
        Err(ProposeError::NoQuorum { waited: started.elapsed() })
    }
}
