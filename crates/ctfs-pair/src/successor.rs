//! Commands in the name of a life that has ended.

use std::time::Duration;

use async_trait::async_trait;
use ctfs_consensus::{Consensus, ProposeError};
use ctfs_meta::{MetaError, Op, Reply};
use ctfs_types::{Holder, Incarnation};
use ctfs_vfs::{FsError, Successor};

/// What the file system makes of a command without a verdict.
pub fn no_verdict(error: ProposeError) -> FsError {
    match error {
        ProposeError::NoQuorum { waited } => FsError::NoQuorum { waited },
        ProposeError::Stopped(_) => FsError::Shutdown,
        ProposeError::NoSpace => FsError::NoSpace,
        ProposeError::LifeEnded => FsError::Meta(MetaError::StaleIncarnation),
        other => {
            tracing::warn!(error = %other, "a command found no verdict");
            FsError::NoQuorum { waited: Duration::ZERO }
        }
    }
}

/// Whoever sends what a life left.
pub struct InTheNameOf {
    pub consensus: Consensus,
    pub by: Holder,
    pub life: Incarnation,
}

#[async_trait]
impl Successor for InTheNameOf {
    async fn propose(&self, op: Op) -> Result<Reply, FsError> {
        self.consensus.propose_left(self.by, self.life, op).await.map_err(no_verdict)?.map_err(FsError::Meta)
    }
}
