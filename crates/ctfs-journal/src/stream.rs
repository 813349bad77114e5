//! Carries a journal to one copy.
//!
//! One batch is under way at a time. A record that somebody waits for goes out at once, if nothing is under
//! way; what nobody waits for gathers for a moment, and what is appended meanwhile goes with the next batch. So
//! a lone record takes one round trip, many share one, and what is in flight is bounded by a batch. After an error nothing is assumed: an
//! empty batch asks what the copy has, and the stream goes on from there.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::{sync::watch, task::JoinHandle, time};
use tracing::{debug, info, warn};

use crate::{BATCH_RECORDS_MAX, Batch, Journal, JournalError, JournalId, Position, RECORD_BYTES_MAX, Record, Refusal};

/// How a batch reaches [`Copies::accept`](crate::Copies::accept) of the pair.
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// Answers what the copy answered. May be lost on the way there or back, arrive twice or late.
    async fn send(&self, id: JournalId, batch: Batch) -> Result<Position, TransportError>;
}

/// Why there is no position.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It is not known whether the copy has it.
    #[error("the pair cannot be reached: {0}")]
    Unreachable(String),
}

/// Sizes and times of a stream.
#[derive(Debug, Clone, Copy)]
pub struct StreamSettings {
    /// Bytes of a batch: more use a long way better, and make a record behind them wait longer.
    pub batch_bytes: usize,
    /// A batch that is not answered by then is taken for lost.
    pub patience: Duration,
    /// Pause after the first error, doubled after each further one.
    pub pause: Duration,
    pub pause_max: Duration,
    /// A trim travels with the next batch, or alone after this long.
    pub trim_after: Duration,
    /// A record that nobody waits for goes out after this long.
    pub gather_for: Duration,
}

impl Default for StreamSettings {
    fn default() -> Self {
        Self {
            batch_bytes: 4 << 20,
            patience: Duration::from_secs(5),
            pause: Duration::from_millis(20),
            pause_max: Duration::from_secs(1),
            trim_after: Duration::from_secs(1),
            gather_for: Duration::from_millis(20),
        }
    }
}

/// Why a stream carries nothing more.
#[derive(Debug, Clone, thiserror::Error)]
pub enum End {
    /// This life has been declared over.
    #[error("this life is fenced in epoch {epoch}")]
    Fenced { epoch: u64 },
    /// The copy is not a copy. Nothing of it may be replayed.
    #[error("the copy has another record {position}")]
    Diverged { position: Position },
    #[error("the journal can be read no more: {0}")]
    Journal(JournalError),
    #[error("stopped")]
    Stopped,
}

/// How far the copy is.
#[derive(Debug, Clone, Default)]
pub struct StreamState {
    /// The copy has answered: it is there, also where nothing is in it.
    pub is_there: bool,
    /// What the copy said last. Less than before if it has lost what it had.
    pub durable: Position,
    /// What went wrong last, since nothing went right.
    pub trouble: Option<String>,
    pub ended: Option<End>,
}

/// A task that carries a journal to a copy until it is dropped.
pub struct Stream {
    state: watch::Receiver<StreamState>,
    /// Somebody waits for the records up to there.
    wanted: watch::Sender<Position>,
    task: JoinHandle<()>,
}

impl Stream {
    /// Begins to carry `journal`. Must be called within a runtime.
    pub fn start(journal: Arc<Journal>, transport: Arc<dyn Transport>, settings: StreamSettings) -> Self {
        let (sender, state) = watch::channel(StreamState::default());
        let (wanted, wants) = watch::channel(Position::NONE);
        let carrier = Carrier { journal, transport, settings, state: sender, wanted: wants, next: None, told_kept: Position::NONE };
        Self { state, wanted, task: tokio::spawn(carrier.run()) }
    }

    pub fn watch(&self) -> watch::Receiver<StreamState> {
        self.state.clone()
    }

    /// Waits until there is a copy and has all records up to `position` on its disk. How long is the caller's
    /// to bound: a pair may never come back. Once the life is fenced or the copy has diverged,
    /// earlier positions are refused too.
    pub async fn durable_at(&self, position: Position) -> Result<(), End> {
        self.wanted.send_if_modified(|wanted| {
            let is_more = *wanted < position;
            *wanted = position.max(*wanted);
            is_more
        });
        let mut state = self.state.clone();
        let now = state.wait_for(|state| state.is_there && state.durable >= position || state.ended.is_some()).await;
        match now {
            Ok(state) => match &state.ended {
                None => Ok(()),
                Some(End::Journal(_) | End::Stopped) if state.durable >= position => Ok(()),
                Some(end) => Err(end.clone()),
            },
            Err(_) => Err(End::Stopped),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Carrier {
    journal: Arc<Journal>,
    transport: Arc<dyn Transport>,
    settings: StreamSettings,
    state: watch::Sender<StreamState>,
    wanted: watch::Receiver<Position>,
    /// The first record that the copy lacks; unknown at first and after an error.
    next: Option<Position>,
    /// From where on the copy knows that records are kept.
    told_kept: Position,
}

impl Carrier {
    async fn run(mut self) {
        let mut pause = self.settings.pause;
        let end = loop {
            let batch = match self.next_batch().await {
                Ok(batch) => batch,
                Err(end) => break end,
            };
            let kept_from = batch.kept_from;
            let sent = self.transport.send(self.journal.id(), batch);
            let answer = time::timeout(self.settings.patience, sent).await.unwrap_or_else(|_| {
                Err(TransportError::Unreachable(format!("no answer within {:?}", self.settings.patience)))
            });
            let trouble = match answer {
                Ok(has) if has > self.journal.depth().appended => break End::Diverged { position: has },
                Ok(has) => {
                    self.told_kept = kept_from;
                    self.answered(has);
                    pause = self.settings.pause;
                    continue;
                }
                Err(TransportError::Refused(Refusal::Fenced { epoch })) => break End::Fenced { epoch },
                Err(TransportError::Refused(Refusal::Diverged { position })) => break End::Diverged { position },
                // The copy lost what it had; from there on it is offered again, after a pause.
                Err(TransportError::Refused(Refusal::Gap { has })) => {
                    warn!(journal = %self.journal.id(), %has, next = ?self.next, "the copy ends earlier than it said");
                    Refusal::Gap { has }.to_string()
                }
                Err(trouble) => trouble.to_string(),
            };
            debug!(journal = %self.journal.id(), trouble, "the pair did not take a batch");
            self.next = None;
            self.state.send_modify(|state| state.trouble = Some(trouble));
            time::sleep(pause).await;
            pause = (pause * 2).min(self.settings.pause_max);
        };
        info!(journal = %self.journal.id(), %end, "the stream to the pair ends");
        self.state.send_modify(|state| state.ended = Some(end));
    }

    fn answered(&mut self, has: Position) {
        self.next = Some(has.next());
        self.state.send_if_modified(|state| {
            let news = !state.is_there || state.durable != has || state.trouble.is_some();
            if has < state.durable {
                warn!(journal = %self.journal.id(), before = %state.durable, %has, "the copy lost records it had");
            }
            (state.is_there, state.durable, state.trouble) = (true, has, None);
            news
        });
    }

    /// Waits for something to send.
    async fn next_batch(&mut self) -> Result<Batch, End> {
        let mut appended = self.journal.watch_appended();
        loop {
            let depth = self.journal.depth();
            let kept_from = depth.trimmed.next();
            let Some(next) = self.next else { return Ok(Batch::new(kept_from, Vec::new())) };
            let next = next.max(kept_from);
            if next <= depth.appended {
                self.gather(next).await?;
                match self.read(next).await {
                    Ok(records) => return Ok(Batch::new(kept_from.min(next), records)),
                    // Trimmed since: the copy needs it no more either.
                    Err(JournalError::Trimmed { .. }) => continue,
                    Err(why) => return Err(End::Journal(why)),
                }
            }
            let ended = self.journal.ended();
            let trimmed = async {
                self.journal.trimmed(self.told_kept).await?;
                time::sleep(self.settings.trim_after).await;
                Ok(())
            };
            tokio::select! {
                _ = appended.wait_for(|appended| *appended >= next) => {}
                done = trimmed => {
                    done.map_err(End::Journal)?;
                    return Ok(Batch::new(self.journal.depth().trimmed.next(), Vec::new()));
                }
                why = ended => return Err(End::Journal(why)),
            }
        }
    }

    /// Waits a moment for more, unless somebody waits for this record.
    async fn gather(&mut self, next: Position) -> Result<(), End> {
        let journal = self.journal.clone();
        let gathered = time::timeout(self.settings.gather_for, self.wanted.wait_for(|wanted| *wanted >= next));
        tokio::select! {
            // Late, or wanted, or the stream is about to be dropped.
            _ = gathered => Ok(()),
            why = journal.ended() => Err(End::Journal(why)),
        }
    }

    async fn read(&self, from: Position) -> Result<Vec<Record>, JournalError> {
        // One record may be longer than a batch should be, and is alone then.
        let bytes = self.settings.batch_bytes.min(RECORD_BYTES_MAX);
        let mut records = match self.journal.read_recent(from, bytes)? {
            Some(records) => records,
            None => {
                let journal = self.journal.clone();
                let read = ctfs_host::blocking(move || journal.read(from, bytes));
                read.await.map_err(|_| JournalError::Closed)??
            }
        };
        records.truncate(BATCH_RECORDS_MAX);
        Ok(records)
    }
}
