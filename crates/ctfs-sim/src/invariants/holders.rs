//! Two holders never: what a holder had happen ahead of the log is what the log then makes of it.
//!
//! With two servers that act ahead in one directory, or one that acts on a state that was not the last,
//! the log refuses a command or makes something else of it, and `ctfs-consensus` says so. So the
//! invariant is that it never does, unless the life was ended.

use std::sync::{Arc, Weak};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

use crate::shared::Shared;

/// What the product logs of it.
const DIVERGED: &str = "made something else";
const REFUSED: &str = "refused what had happened here";
const NOT_POSSIBLE: &str = "is not possible any more";

/// Listens to what the product logs.
pub struct Listener {
    shared: Weak<Shared>,
    level: Level,
}

impl Listener {
    /// From here on errors are noted in the trace.
    pub fn install(shared: &Arc<Shared>, level: Level) {
        let listener = Self { shared: Arc::downgrade(shared), level };
        // A second simulation in one process has none.
        let _ = tracing::subscriber::set_global_default(listener);
    }
}

#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        use std::fmt::Write;
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.level && metadata.target().starts_with("ctfs")
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let Some(shared) = self.shared.upgrade() else { return };
        let mut text = Text::default();
        event.record(&mut text);
        if *event.metadata().level() == Level::ERROR && [DIVERGED, REFUSED, NOT_POSSIBLE].iter().any(|told| text.0.contains(told)) {
            shared.history.lock().violation(shared.now(), format!("two holders: {}", text.0));
        }
        if let Some(mut trace) = shared.trace.try_lock() {
            trace.line(shared.now(), ctfs_types::NodeId(0), format_args!("{} {}", event.metadata().level(), text.0));
        }
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}
