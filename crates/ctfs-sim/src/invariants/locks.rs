//! One exclusive lock: who has it, also when lives end.

use super::linearizable::Model;

pub struct Locks;

/// A program that may hold the lock, and the life of its server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner {
    pub life: u64,
    pub program: u64,
}

#[derive(Debug)]
pub enum Action {
    Try(Owner),
    Unlock(Owner),
    /// The life has ended: whatever it had is free from some moment on.
    LifeEnds(u64),
}

#[derive(Debug, PartialEq)]
pub enum Answer {
    Done,
    Busy,
}

impl Model for Locks {
    type State = Option<Owner>;
    type Action = Action;
    type Answer = Answer;

    fn apply(state: &Option<Owner>, action: &Action) -> (Option<Owner>, Answer) {
        match action {
            Action::Try(owner) if state.is_some_and(|holder| holder != *owner) => (*state, Answer::Busy),
            Action::Try(owner) => (Some(*owner), Answer::Done),
            Action::Unlock(owner) => (state.filter(|holder| holder != owner), Answer::Done),
            Action::LifeEnds(life) => (state.filter(|holder| holder.life != *life), Answer::Done),
        }
    }
}
