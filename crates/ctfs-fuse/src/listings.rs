//! Listings that the kernel keeps (`FOPEN_CACHE_DIR`), so that a directory that is listed again and again is
//! asked for once.
//!
//! An opened directory is asked for all the same, and what the kernel keeps of its listing is used only if
//! that answer says so. What its own programs change there the kernel sees by itself. What changes elsewhere
//! makes it drop the listing before the change is acknowledged. An answer that was under way meanwhile gets in
//! after that; but the kernel uses a listing only when it was told of the end, and whoever asks for the end has
//! taken in what it was given before: so the listing is dropped once more before that answer. For that, one
//! handle at a time fills it.
//!
//! A listing is used no longer than the names in it: later, a program that asks for the attributes of all of
//! them is served better by another listing that brings them along.

use std::{collections::HashMap, time::Instant};

use ctfs_types::Ino;
use parking_lot::Mutex;

/// Listings remembered that no handle is open of; past it those that are too old are thrown out.
const LISTINGS_MAX: usize = 4096;

#[derive(Debug, Default)]
pub struct Listings(Mutex<HashMap<Ino, Listing>>);

#[derive(Debug, Default)]
struct Listing {
    /// Handles through which the kernel may fill or use it.
    open: u32,
    /// A name changed elsewhere since the first of them was opened.
    changed: bool,
    state: State,
}

#[derive(Debug, Default, Clone, Copy)]
enum State {
    /// The kernel has none, or one that it must not use again.
    #[default]
    None,
    Filling(Names),
    Whole(Names),
}

/// How long the kernel has the names of a listing, too.
#[derive(Debug, Clone, Copy)]
enum Names {
    /// Nothing was answered yet.
    Unanswered,
    Until(Instant),
    /// It was given names alone.
    Unknown,
}

/// What the kernel may do with a directory that is being opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    /// Ask for each listing.
    Ask,
    /// Forget what it has and keep what it is answered now.
    Fill,
    /// Use what it has.
    Keep,
}

impl Names {
    fn and(self, until: Option<Instant>) -> Self {
        match (self, until) {
            (Self::Unanswered, Some(until)) => Self::Until(until),
            (Self::Until(earlier), Some(until)) => Self::Until(earlier.min(until)),
            (Self::Unknown, _) | (_, None) => Self::Unknown,
        }
    }
}

impl Listings {
    /// A directory is being opened, in which names may be kept at all. Unless the answer is [`Usage::Ask`],
    /// [`Self::closed`] must follow.
    pub fn opened(&self, dir: Ino, now: Instant) -> Usage {
        let mut listings = self.0.lock();
        if listings.len() >= LISTINGS_MAX {
            listings.retain(|_, listing| listing.open > 0 || listing.is_good(now));
        }
        if listings.len() >= LISTINGS_MAX && !listings.contains_key(&dir) {
            return Usage::Ask;
        }
        let listing = listings.entry(dir).or_default();
        let usage = if listing.is_good(now) {
            Usage::Keep
        } else if listing.open == 0 {
            *listing = Listing { state: State::Filling(Names::Unanswered), ..Listing::default() };
            Usage::Fill
        } else {
            return Usage::Ask;
        };
        listing.open += 1;
        usage
    }

    /// A part is answered. The kernel knows the names in it until then; `None`: it does not learn them.
    pub fn listed(&self, dir: Ino, until: Option<Instant>) {
        if let Some(Listing { state: State::Filling(names), .. }) = self.0.lock().get_mut(&dir) {
            *names = names.and(until);
        }
    }

    /// The end is about to be answered. Returns whether the kernel has to drop the listing first.
    #[must_use]
    pub fn ends(&self, dir: Ino) -> bool {
        let mut listings = self.0.lock();
        let Some(listing) = listings.get_mut(&dir) else { return false };
        if !listing.changed && let State::Filling(names) = listing.state {
            listing.state = State::Whole(names);
        }
        listing.changed
    }

    /// A handle that was not opened with [`Usage::Ask`] is closed.
    pub fn closed(&self, dir: Ino) {
        let mut listings = self.0.lock();
        let Some(listing) = listings.get_mut(&dir) else { return };
        listing.open = listing.open.saturating_sub(1);
        if listing.open == 0 && !matches!(listing.state, State::Whole(Names::Until(_))) {
            listings.remove(&dir);
        }
    }

    /// A name in it changed without this kernel's knowing. Returns whether the kernel may have a listing, and
    /// has to drop it.
    #[must_use]
    pub fn changed(&self, dir: Ino) -> bool {
        let mut listings = self.0.lock();
        let Some(listing) = listings.get_mut(&dir) else { return false };
        if listing.open == 0 {
            // The next that opens it makes the kernel drop it.
            listings.remove(&dir);
            return false;
        }
        listing.changed = true;
        listing.state = State::None;
        true
    }

    /// Anything may have changed.
    pub fn all_changed(&self) {
        self.0.lock().retain(|_, listing| {
            listing.changed = true;
            listing.state = State::None;
            listing.open > 0
        });
    }
}

impl Listing {
    fn is_good(&self, now: Instant) -> bool {
        matches!(self.state, State::Whole(Names::Until(until)) if now < until)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const DIR: Ino = Ino(5);

    /// One that is whole and of which the kernel has the names for a second from `now` on.
    fn filled(now: Instant) -> Listings {
        let listings = Listings::default();
        assert_eq!(listings.opened(DIR, now), Usage::Fill);
        listings.listed(DIR, Some(now + Duration::from_secs(2)));
        listings.listed(DIR, Some(now + Duration::from_secs(1)));
        assert!(!listings.ends(DIR));
        listings
    }

    #[test]
    fn a_whole_listing_is_used_for_as_long_as_the_names_in_it() {
        let now = Instant::now();
        let listings = filled(now);
        assert_eq!(listings.opened(DIR, now), Usage::Keep, "also while the first is open");
        listings.closed(DIR);
        listings.closed(DIR);
        assert_eq!(listings.opened(DIR, now + Duration::from_millis(999)), Usage::Keep);
        listings.closed(DIR);
        assert_eq!(listings.opened(DIR, now + Duration::from_secs(1)), Usage::Fill);
    }

    #[test]
    fn a_listing_that_is_not_whole_or_without_the_names_is_not_used_again() {
        let (listings, now) = (Listings::default(), Instant::now());
        let until = now + Duration::from_secs(1);
        assert_eq!(listings.opened(DIR, now), Usage::Fill);
        listings.listed(DIR, Some(until));
        listings.closed(DIR);
        assert_eq!(listings.opened(DIR, now), Usage::Fill, "its end was not answered");
        listings.listed(DIR, Some(until));
        listings.listed(DIR, None);
        assert!(!listings.ends(DIR));
        listings.closed(DIR);
        assert_eq!(listings.opened(DIR, now), Usage::Fill, "some names are not known");
    }

    #[test]
    fn one_handle_at_a_time_fills_it() {
        let (listings, now) = (Listings::default(), Instant::now());
        assert_eq!(listings.opened(DIR, now), Usage::Fill);
        assert_eq!(listings.opened(DIR, now), Usage::Ask);
        assert_eq!(listings.opened(Ino(6), now), Usage::Fill);
    }

    #[test]
    fn a_change_drops_it_and_again_at_the_end_of_what_was_being_filled() {
        let (listings, now) = (Listings::default(), Instant::now());
        assert!(!listings.changed(DIR), "there is none");
        assert_eq!(listings.opened(DIR, now), Usage::Fill);
        listings.listed(DIR, Some(now + Duration::from_secs(1)));
        assert!(listings.changed(DIR));
        assert!(listings.ends(DIR), "an answer from before may have got in");
        assert_eq!(listings.opened(DIR, now), Usage::Ask);
        assert!(listings.ends(DIR), "for as long as the handle is open");
        listings.closed(DIR);
        assert_eq!(listings.opened(DIR, now), Usage::Fill);
        assert!(!listings.ends(DIR));
    }

    #[test]
    fn a_listing_that_changed_while_nobody_had_it_open_is_forgotten() {
        let now = Instant::now();
        for change in [|listings: &Listings| assert!(!listings.changed(DIR)), Listings::all_changed] {
            let listings = filled(now);
            listings.closed(DIR);
            change(&listings);
            assert_eq!(listings.opened(DIR, now), Usage::Fill);
        }
    }
}
