//! The mode of a file: what `stat` shows is what `chmod` set last.

use super::linearizable::Model;

pub struct Attributes;

#[derive(Debug)]
pub enum Action {
    Set(u16),
    Get,
}

#[derive(Debug, PartialEq)]
pub enum Answer {
    Done,
    Is(u16),
}

impl Model for Attributes {
    type State = u16;
    type Action = Action;
    type Answer = Answer;

    fn apply(state: &u16, action: &Action) -> (u16, Answer) {
        match action {
            Action::Set(mode) => (*mode, Answer::Done),
            Action::Get => (*state, Answer::Is(*state)),
        }
    }
}
