// SPDX-License-Identifier: GPL-2.0

//! A TCP connection that breaks when a test says so.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crate::check::Result;

/// What changes bytes on their way to the destination.
pub type Meddler = Box<dyn FnMut(&mut [u8]) + Send>;

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
                // Whoever lacks memory for that has other worries.
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

    /// Have the bytes changed that go to the other side.
    pub fn meddle(&self, meddler: Option<Meddler>) {
        *self
            .inside
            .meddler
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = meddler;
    }
}

impl Inside {
    fn ends(&self) -> std::sync::MutexGuard<'_, Vec<TcpStream>> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(self: Arc<Self>, near: TcpStream, far: TcpStream) -> std::io::Result<()> {
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        self.ends().extend([near.try_clone()?, far.try_clone()?]);
        let (back, forth) = ((far.try_clone()?, near.try_clone()?), (near, far));
        let there = self.clone();
        thread::spawn(move || there.pass(forth, true));
        thread::spawn(move || self.pass(back, false));
        Ok(())
    }

    fn pass(&self, (mut from, mut to): (TcpStream, TcpStream), forth: bool) {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            let bytes = &mut bytes[..count];
            if forth {
                self.bytes.fetch_add(count as u64, Ordering::Relaxed);
                let mut meddler = self.meddler.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(meddle) = meddler.as_mut() {
                    meddle(bytes);
                }
            }
            if to.write_all(bytes).is_err() {
                break;
            }
        }
        // Who has closed one end has closed both.
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }
}
