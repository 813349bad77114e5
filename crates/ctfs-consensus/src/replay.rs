//! Commands that happened in an earlier life of this server and may not be in the log.
//!
//! They wait in the journal of that life. Before a new life is reported, which ends the old one, they
//! are sent in their order, under the requests they had: those that the log has already are answered
//! from the table of verdicts and change nothing.

use ctfs_meta::{Command, MetaError};
use ctfs_types::codec::{self, CodecError};
use tokio::time::{Instant, sleep};

use crate::{
    core::Core,
    error::ProposeError,
    proposer::{Outcome, encoded_bytes},
    settings::COMMAND_BYTES_MAX,
};

/// Version byte of a command in the journal.
const VERSION: u8 = 2;
/// Before commands are sent again that found no answer.
const TRY_AGAIN: std::time::Duration = std::time::Duration::from_millis(50);

/// A command as the journal keeps it.
pub fn encode_record(command: &Command) -> Vec<u8> {
    codec::encode(VERSION, command)
}

/// # Errors
/// It is no command, or of another version.
pub fn decode_record(bytes: &[u8]) -> Result<Command, CodecError> {
    codec::decode(VERSION, bytes, COMMAND_BYTES_MAX)
}

/// What became of commands that were sent again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Replayed {
    /// In the log now, or before.
    pub happened: u64,
    /// Refused, because that life was ended before.
    pub lost: u64,
}

impl Core {
    /// Sends commands of an earlier life. All of them are decided when this answers.
    ///
    /// # Errors
    /// [`ProposeError::NoQuorum`], [`ProposeError::Stopped`]: from some command on none is decided; send
    /// all of them again later.
    pub async fn replay(&self, commands: &[Command]) -> Result<Replayed, ProposeError> {
        let limits = &self.settings.limits;
        let mut replayed = Replayed::default();
        let mut rest = commands;
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
            for verdict in self.replay_batch(batch, bytes).await? {
                match verdict {
                    Ok(_) | Err(MetaError::Answered) => replayed.happened += 1,
                    Err(why) => {
                        tracing::warn!(%why, "a change of an earlier life of this server is lost");
                        replayed.lost += 1;
                    }
                }
            }
            rest = later;
        }
        Ok(replayed)
    }

    async fn replay_batch(&self, batch: &[Command], bytes: usize) -> Result<Vec<Result<ctfs_meta::Reply, MetaError>>, ProposeError> {
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
                Outcome::Answered(answer) => return Ok(answer.verdicts),
                Outcome::NoSpace => return Err(ProposeError::NoSpace),
                Outcome::NotLeader | Outcome::Unsure => sleep(TRY_AGAIN).await,
            }
        }
        Err(ProposeError::NoQuorum { waited: started.elapsed() })
    }
}
