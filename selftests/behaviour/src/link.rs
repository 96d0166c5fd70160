// SPDX-License-Identifier: GPL-2.0

//! The way of a migration from its source to its destination, on which things go wrong when a test says so.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use kdp_migrate::wire::{decode, encode, Message, Reason};

use crate::check::Result;

/// What becomes of a message to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    /// It arrives.
    Pass,
    /// In its place there comes another one of pages, if the guest has gone over by then.
    Replace,
    /// It never arrives.
    Drop,
    /// It arrives twice.
    Repeat,
    /// A bit of it is wrong.
    Damage,
}

/// What decides on it.
pub type Meddler = Box<dyn FnMut(&Message<'_>) -> Fate + Send>;

/// Passes on what it gets, both ways.
pub struct Link {
    address: String,
    inside: Arc<Inside>,
}

#[derive(Default)]
struct Inside {
    ends: Mutex<Vec<TcpStream>>,
    bytes: AtomicU64,
    meddler: Mutex<Option<Meddler>>,
    meddled: Mutex<HashMap<Fate, u64>>,
}

impl Link {
    /// To whoever listens at that address.
    pub fn to(address: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let link = Self {
            address: listener.local_addr()?.to_string(),
            inside: Arc::default(),
        };
        let (inside, to) = (link.inside.clone(), address.to_owned());
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                // Nobody listens there any more: it is as if nobody did here.
                let Ok(far) = TcpStream::connect(&to) else {
                    continue;
                };
                // If it fails both ends are closed: the connection is broken.
                let _ = inside.clone().join(near, far);
            }
        });
        Ok(link)
    }

    /// Where to connect to.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Bytes that went to the other side.
    pub fn bytes(&self) -> u64 {
        self.inside.bytes.load(Ordering::Relaxed)
    }

    /// Break the connection; whether there was one.
    pub fn cut(&self) -> bool {
        let ends = std::mem::take(&mut *self.inside.ends());
        for end in &ends {
            // It fails where the other side was faster.
            let _ = end.shutdown(Shutdown::Both);
        }
        !ends.is_empty()
    }

    /// Have it decide on the messages that go to the other side.
    pub fn meddle(&self, meddler: Meddler) {
        *self.inside.meddler() = Some(meddler);
    }

    /// How many messages had that fate.
    pub fn meddled(&self, fate: Fate) -> u64 {
        self.inside.meddled().get(&fate).copied().unwrap_or(0)
    }
}

impl Inside {
    fn ends(&self) -> MutexGuard<'_, Vec<TcpStream>> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn meddler(&self) -> MutexGuard<'_, Option<Meddler>> {
        self.meddler.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn meddled(&self) -> MutexGuard<'_, HashMap<Fate, u64>> {
        self.meddled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(self: Arc<Self>, near: TcpStream, far: TcpStream) -> std::io::Result<()> {
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        // A source has one connection at a time: what it had before is over, and its descriptors go.
        *self.ends() = vec![near.try_clone()?, far.try_clone()?];
        let (back, forth) = ((far.try_clone()?, near.try_clone()?), (near, far));
        let there = self.clone();
        thread::spawn(move || there.forth(forth));
        thread::spawn(move || pass(back, |_, bytes| bytes.to_vec()));
        Ok(())
    }

    /// Whole messages, each as it is decided on.
    fn forth(&self, ends: (TcpStream, TcpStream)) {
        // The last frame of pages that can still be sent, and its number.
        let mut before: Option<(u16, Vec<u8>)> = None;
        let mut number = 0;
        pass(ends, |waiting, bytes| {
            self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            waiting.extend_from_slice(bytes);
            let mut out = Vec::new();
            while let Ok(Some((message, length))) = decode(waiting, number) {
                let fate = match self.meddler().as_mut() {
                    Some(decide) => decide(&message),
                    None => Fate::Pass,
                };
                // What was sent before the guest went over may be old by now.
                let stays =
                    matches!(&message, Message::Pages { reason, .. } if *reason != Reason::PreCopy);
                let frame: Vec<u8> = waiting.drain(..length).collect();
                let other = before.as_ref().filter(|_| stays);
                let other = other.and_then(|(number, bytes)| decode(bytes, *number).ok()?);
                let fate = match (fate, &other) {
                    (Fate::Replace, None) => Fate::Pass,
                    (fate, _) => fate,
                };
                *self.meddled().entry(fate).or_default() += 1;
                let start = out.len();
                match (fate, other) {
                    (Fate::Drop, _) => {}
                    (Fate::Replace, Some((other, _))) => encode(&other, number, &mut out),
                    (Fate::Repeat, _) => out.extend([&frame[..], &frame[..]].concat()),
                    _ => out.extend_from_slice(&frame),
                }
                if fate == Fate::Damage {
                    out[start + frame.len() / 2] ^= 1;
                }
                if stays && matches!(fate, Fate::Pass | Fate::Repeat) {
                    before = Some((number, frame));
                }
                number = number.wrapping_add(1);
            }
            out
        });
    }
}

/// Pass on what `change` makes of what comes; what it keeps for later is its first argument.
fn pass(
    (mut from, mut to): (TcpStream, TcpStream),
    mut change: impl FnMut(&mut Vec<u8>, &[u8]) -> Vec<u8>,
) {
    let (mut bytes, mut kept) = (vec![0; 64 << 10], Vec::new());
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        if to.write_all(&change(&mut kept, &bytes[..count])).is_err() {
            break;
        }
    }
    // Who has closed one end has closed both.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
