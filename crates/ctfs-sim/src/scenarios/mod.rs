//! The nineteen scenarios of the coherence notes.
