//! Two names in two directories: what they lead to, told apart by mode.

use super::linearizable::Model;

pub struct Names;

#[derive(Debug, Clone, Copy)]
pub enum Action {
    /// With `O_EXCL`, a file of this mode.
    Make { name: usize, tag: u16 },
    Remove { name: usize },
    /// Replaces what is there.
    Rename { from: usize, to: usize },
    Look { name: usize },
}

#[derive(Debug, PartialEq)]
pub enum Answer {
    Done,
    Exists,
    NoEntry,
    Leads(Option<u16>),
}

impl Model for Names {
    type State = [Option<u16>; 2];
    type Action = Action;
    type Answer = Answer;

    fn apply(state: &Self::State, action: &Action) -> (Self::State, Answer) {
        let mut next = *state;
        let answer = match *action {
            Action::Make { name, .. } if state[name].is_some() => Answer::Exists,
            Action::Make { name, tag } => {
                next[name] = Some(tag);
                Answer::Done
            }
            Action::Remove { name } | Action::Rename { from: name, .. } if state[name].is_none() => Answer::NoEntry,
            Action::Remove { name } => {
                next[name] = None;
                Answer::Done
            }
            Action::Rename { from, to } => {
                next[to] = next[from].take();
                Answer::Done
            }
            Action::Look { name } => Answer::Leads(state[name]),
        };
        (next, answer)
    }
}
