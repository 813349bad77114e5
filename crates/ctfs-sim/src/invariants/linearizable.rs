//! Whether a history can be explained by calls that each took effect at one moment between its question
//! and its answer (Herlihy and Wing, 1990; the search is that of Wing and Gong, 1993, with the memory of
//! Lowe, 2017).

use std::{
    collections::HashSet,
    fmt::{Debug, Write},
    hash::Hash,
    time::Duration,
};

/// Calls of one object that the search takes.
pub const CALLS_MAX: usize = 128;

/// What an object does, one call after the other.
pub trait Model {
    type State: Clone + Eq + Hash + Default;
    type Action: Debug;
    type Answer: Debug + PartialEq;

    fn apply(state: &Self::State, action: &Self::Action) -> (Self::State, Self::Answer);
}

#[derive(Debug)]
struct Call<A, R> {
    node: u64,
    action: A,
    begun: Duration,
    /// Without one it may have taken effect at any time since, or never.
    ended: Option<(Duration, R)>,
    /// It has no effect and no answer to check.
    dropped: bool,
}

/// The calls of one object.
pub struct Calls<M: Model>(Vec<Call<M::Action, M::Answer>>);

impl<M: Model> Default for Calls<M> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<M: Model> Calls<M> {
    /// Whether another call may be made.
    pub fn has_room(&self) -> bool {
        self.0.len() < CALLS_MAX
    }

    /// A program of `node` asks; answers the number of the call.
    pub fn begin(&mut self, now: Duration, node: u64, action: M::Action) -> usize {
        assert!(self.has_room(), "more calls than the search takes");
        self.0.push(Call { node, action, begun: now, ended: None, dropped: false });
        self.0.len() - 1
    }

    pub fn end(&mut self, now: Duration, call: usize, answer: M::Answer) {
        self.0[call].ended = Some((now, answer));
    }

    /// The call changed nothing and was not answered.
    pub fn drop_call(&mut self, call: usize) {
        self.0[call].dropped = true;
    }

    /// Whether a call of the same node that `other` names was under way during this one.
    pub fn overlaps(&self, call: usize, other: impl Fn(&M::Action) -> bool) -> bool {
        let this = &self.0[call];
        let ended_after = |ended: &Option<(Duration, M::Answer)>| ended.as_ref().is_none_or(|(ended, _)| *ended >= this.begun);
        self.0.iter().any(|call| call.node == this.node && other(&call.action) && ended_after(&call.ended))
    }

    pub fn open(&self) -> usize {
        self.0.iter().filter(|call| !call.dropped && call.ended.is_none()).count()
    }

    pub fn answered(&self) -> usize {
        self.0.iter().filter(|call| call.ended.is_some()).count()
    }

    /// What is wrong, if no order explains the answers.
    pub fn check(&self, name: &str) -> Option<String> {
        let calls: Vec<_> = self.0.iter().filter(|call| !call.dropped).collect();
        let must: u128 = calls.iter().enumerate().filter(|(_, call)| call.ended.is_some()).fold(0, |mask, (at, _)| mask | (1 << at));
        let mut seen: HashSet<(u128, M::State)> = HashSet::new();
        let mut stack = vec![(0u128, M::State::default())];
        let mut furthest = 0u128;
        while let Some((done, state)) = stack.pop() {
            if done & must == must {
                return None;
            }
            if (done & must).count_ones() > (furthest & must).count_ones() {
                furthest = done;
            }
            let is_done = |at: usize| done & (1 << at) != 0;
            let first_end = calls.iter().enumerate().filter(|(at, _)| !is_done(*at)).filter_map(|(_, call)| Some(call.ended.as_ref()?.0)).min();
            for (at, call) in calls.iter().enumerate() {
                if is_done(at) || first_end.is_some_and(|end| call.begun > end) {
                    continue;
                }
                let (next, answer) = M::apply(&state, &call.action);
                if call.ended.as_ref().is_some_and(|(_, seen)| *seen != answer) {
                    continue;
                }
                let step = (done | (1 << at), next);
                if seen.insert(step.clone()) {
                    stack.push(step);
                }
            }
        }
        let mut text = format!("{name}: no order of these calls explains their answers (one in it explains those with *)");
        for (at, call) in calls.iter().enumerate() {
            let mark = if furthest & (1 << at) != 0 { '*' } else { ' ' };
            let begun = call.begun.as_secs_f64();
            let _ = match &call.ended {
                Some((ended, answer)) => {
                    write!(text, "\n    {mark} {begun:>10.6} to {:>10.6} s{} {:?} -> {answer:?}", ended.as_secs_f64(), call.node, call.action)
                }
                None => write!(text, "\n    {mark} {begun:>10.6} to            ? s{} {:?}", call.node, call.action),
            };
        }
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::invariants::attributes::{Action, Answer, Attributes};

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_read_of_the_past_has_no_explanation() {
        let mut calls = Calls::<Attributes>::default();
        let write = calls.begin(at(1), 1, Action::Set(7));
        calls.end(at(2), write, Answer::Done);
        let read = calls.begin(at(3), 2, Action::Get);
        calls.end(at(4), read, Answer::Is(0));
        assert!(calls.check("x").is_some());
    }

    #[test]
    fn what_overlaps_may_have_happened_in_either_order_and_what_has_no_answer_at_any_time() {
        let mut calls = Calls::<Attributes>::default();
        let write = calls.begin(at(1), 1, Action::Set(7));
        let read = calls.begin(at(2), 2, Action::Get);
        calls.end(at(3), read, Answer::Is(0));
        calls.end(at(4), write, Answer::Done);
        calls.begin(at(4), 3, Action::Set(9));
        let read = calls.begin(at(5), 2, Action::Get);
        calls.end(at(6), read, Answer::Is(7));
        let read = calls.begin(at(90), 2, Action::Get);
        calls.end(at(91), read, Answer::Is(9));
        assert_eq!(calls.check("x"), None);
    }

    #[test]
    fn new_and_then_old_has_no_explanation() {
        let mut calls = Calls::<Attributes>::default();
        calls.begin(at(1), 1, Action::Set(7));
        for (begun, value) in [(2, 7), (4, 0)] {
            let read = calls.begin(at(begun), 2, Action::Get);
            calls.end(at(begun + 1), read, Answer::Is(value));
        }
        assert!(calls.check("x").is_some());
    }
}
