//! Sends what is left to this server by lives that were ended, and drops copies that nobody needs.

use std::sync::Arc;

use ctfs_journal::Fenced;
use ctfs_meta::Op;
use ctfs_types::Holder;

use crate::{Pairs, TICK, journals::{self, PIECE_BYTES}};

impl Pairs {
    /// Takes over from lives that named this server, until it is dropped.
    pub async fn succeed(&self) {
        let mut members = self.members.clone();
        loop {
            tokio::select! {
                _ = members.changed() => {}
                () = tokio::time::sleep(TICK * 4) => {}
            }
            members.borrow_and_update();
            if self.journal.borrow().is_none() {
                continue;
            }
            let left = self.consensus.replica().read().left_to(self.node()).unwrap_or_default();
            for life in left {
                if let Err(why) = self.take_over(life).await {
                    tracing::warn!(server = %life.node, why, "what an ended life left to this server is not sent yet");
                }
            }
            self.drop_copies().await;
        }
    }

    async fn take_over(&self, life: Holder) -> Result<(), String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let id = self.journals.id(life);
        let epoch = self.consensus.replica().read().applied().0;
        let copy: Fenced = match self.copies.fence(id, epoch).await {
            Ok(Some(copy)) => copy,
            Ok(None) => return Err("its copy is not here; start that server, or remove it".to_owned()),
            Err(refusal) => return Err(text(&refusal)),
        };
        let reader = copy.clone();
        let read: journals::ReadRecords = Arc::new(move |from| reader.records(from, PIECE_BYTES));
        // Of one life of this server or not at all: what it is refused because that has ended is not sent.
        let by = Holder { node: self.node(), incarnation: self.consensus.incarnation() };
        journals::send(id, by, copy.kept_from(), read, &self.consensus, &self.vfs).await.map_err(|error| text(&error))?;
        match self.consensus.propose(Op::EndLife { life, by }).await {
            Ok(Ok(_)) => tracing::warn!(server = %life.node, "took over what it had acknowledged; what it held is free now"),
            // It is back, and did it itself.
            Ok(Err(verdict)) => tracing::info!(server = %life.node, %verdict, "what it left was sent otherwise"),
            Err(error) => return Err(text(&error)),
        }
        Ok(())
    }

    /// Drops copies of lives that have ended and left nothing to be sent.
    async fn drop_copies(&self) {
        let Ok(copies) = self.copies.list().await else { return };
        for copy in copies {
            let is_over = {
                let replica = self.consensus.replica();
                let namespace = replica.read();
                let is_ended = namespace.is_ended(copy.id.incarnation).unwrap_or(false);
                is_ended && !namespace.left_by(copy.id.incarnation).unwrap_or(true)
            };
            if is_over && let Err(refusal) = self.copies.remove(copy.id).await {
                tracing::warn!(copy = %copy.id, %refusal, "a copy of an ended life cannot be removed");
            }
        }
    }
}
