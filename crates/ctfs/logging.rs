//! The daemon's log: lines on stderr, as text or as one JSON object each.

use std::{fmt, io::IsTerminal, time::SystemTime};

use ctfs_node::problem::{Code, Problem};
use serde_json::{Map, Value};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter,
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

use crate::choices::LogFormat;

/// What libraries say is below our own level: their news is not an operator's.
const LIBRARIES: &str = "openraft=off,quinn=warn,quinn_proto=warn,quinn_udp=error,rustls=warn,sled=warn,fuser=warn";

/// Starts logging at `level`, or at what CTFS_LOG says: a level, or a filter such as
/// `info,ctfs_chunk=debug`.
///
/// # Errors
/// E0133 for a level that is none.
pub fn start(level: &str, format: LogFormat) -> Result<(), Problem> {
    let level = std::env::var("CTFS_LOG").ok().filter(|level| !level.is_empty()).unwrap_or_else(|| level.to_owned());
    let filter = EnvFilter::try_new(format!("{LIBRARIES},{level}")).map_err(|error| {
        Problem::new(Code::InvalidArgument, format!("{level:?} is not a log level"))
            .why(error.to_string())
            .try_next("write error, warn, info, debug or trace")
    })?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second start in one process keeps the first one's settings; only tests do that.
    let _ = match format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => lines.event_format(JsonLines).try_init(),
    };
    Ok(())
}

/// One JSON object a line: `time`, `level`, `target`, `message`, then the event's fields.
struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut line = Map::new();
        line.insert("time".into(), humantime::format_rfc3339_micros(SystemTime::now()).to_string().into());
        line.insert("level".into(), event.metadata().level().as_str().into());
        line.insert("target".into(), event.metadata().target().into());
        event.record(&mut Fields(&mut line));
        let spans: Vec<Value> = context.event_scope().into_iter().flat_map(|scope| scope.from_root()).map(|span| span.name().into()).collect();
        if !spans.is_empty() {
            line.insert("spans".into(), spans.into());
        }
        writeln!(writer, "{}", Value::Object(line))
    }
}

struct Fields<'a>(&'a mut Map<String, Value>);

impl Visit for Fields<'_> {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().into(), format!("{value:?}").into());
    }
}

#[cfg(test)]
mod tests {
    use std::{io, sync::{Arc, Mutex}};

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_json_line_is_one_object_with_typed_fields() {
        let sink = Sink::default();
        let writer = sink.clone();
        let subscriber = tracing_subscriber::fmt().event_format(JsonLines).with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || tracing::warn!(missed = 5, peer = "a\nb", "peer stopped answering"));
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count(), 1);
        let line: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&line["level"], &line["missed"], &line["message"]), (&"WARN".into(), &5.into(), &"peer stopped answering".into()));
    }

    #[test]
    fn a_level_that_is_none_is_refused() {
        assert!(start("lou=d=x", LogFormat::Text).unwrap_err().is(Code::InvalidArgument));
    }
}
