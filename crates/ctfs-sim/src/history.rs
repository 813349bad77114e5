//! What programs asked and were answered, and when; checked after the run.

use std::{collections::BTreeMap, time::Duration};

use ctfs_types::Incarnation;

use crate::invariants::{
    appends::Appends, attributes::Attributes, fsync::Versions, linearizable::Calls, locks::{self, Locks}, names::Names,
    prefix::Sequences,
};

/// Everything that a run remembers, by object.
#[derive(Default)]
pub struct History {
    pub names: BTreeMap<u64, Calls<Names>>,
    pub attributes: BTreeMap<u64, Calls<Attributes>>,
    pub locks: BTreeMap<u64, Calls<Locks>>,
    pub appends: BTreeMap<u64, Calls<Appends>>,
    pub sequences: Sequences,
    pub versions: Versions,
    /// Some life has ended, and with it may have what was not synced.
    pub lives_ended: bool,
    /// What was found wrong while the run went on.
    pub violations: Vec<String>,
}

impl History {
    /// Something that must never happen did.
    pub fn violation(&mut self, now: Duration, what: String) {
        self.violations.push(format!("{:.6} {what}", now.as_secs_f64()));
    }

    /// From now on a life may be over, at whatever moment the others hear of it.
    pub fn life_ends(&mut self, now: Duration, life: Incarnation) {
        self.lives_ended = true;
        self.sequences.life_ends(life);
        for calls in self.locks.values_mut().filter(|calls| calls.has_room()) {
            calls.begin(now, 0, locks::Action::LifeEnds(life.0));
        }
    }

    /// Everything that is wrong with this history. `is_synced`: programs believed only in what was in the
    /// log; of what they believed in before, the end of a life may take some back.
    pub fn check(&self, is_synced: bool) -> Vec<String> {
        let mut wrong = self.violations.clone();
        if self.lives_ended && !is_synced {
            return wrong;
        }
        wrong.extend(self.names.iter().filter_map(|(object, calls)| calls.check(&format!("names {object}"))));
        wrong.extend(self.attributes.iter().filter_map(|(object, calls)| calls.check(&format!("attributes {object}"))));
        wrong.extend(self.locks.iter().filter_map(|(object, calls)| calls.check(&format!("locks {object}"))));
        wrong.extend(self.appends.iter().filter_map(|(object, calls)| calls.check(&format!("appends {object}"))));
        wrong
    }

    /// Questions whose programs had no answer yet: what is at risk when a fault strikes.
    pub fn at_risk(&self) -> usize {
        let names: usize = self.names.values().map(Calls::open).sum();
        let attributes: usize = self.attributes.values().map(Calls::open).sum();
        let appends: usize = self.appends.values().map(Calls::open).sum();
        let locks: usize = self.locks.values().map(Calls::open).sum();
        names + attributes + appends + locks
    }

    pub fn answered(&self) -> usize {
        let names: usize = self.names.values().map(Calls::answered).sum();
        let attributes: usize = self.attributes.values().map(Calls::answered).sum();
        let appends: usize = self.appends.values().map(Calls::answered).sum();
        let locks: usize = self.locks.values().map(Calls::answered).sum();
        names + attributes + appends + locks
    }
}
