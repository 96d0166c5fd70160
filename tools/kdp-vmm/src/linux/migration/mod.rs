//! A machine that moves: what the engines of [`kdp_migrate`] need of it, on both sides.
//!
//! Page numbers of the engines are guest frame numbers: there is one memslot, from 0 on.

mod incoming;
mod outgoing;
mod pages;

pub use incoming::Incoming;
pub use outgoing::Outgoing;
pub use pages::Pages;
