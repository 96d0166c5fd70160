//! The network between two VMMs, as slow as a link that one bit after another goes over.
//!
//! What the source sends comes out at the link's rate, in the order in which it went in; nothing is lost, and what waits to
//! be sent waits in the sockets' buffers. The way back has acks and requests, and no limit.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::Error;

/// Bytes that are passed on at once: a page, so that one does not wait for many.
const PIECE: usize = 4096;

/// Who sleeps sleeps for at least as long as this: what is shorter is made up for by the next sleep.
const SHORTEST: Duration = Duration::from_micros(500);

/// A link to one address.
pub struct Link {
    address: String,
}

impl Link {
    /// Whoever connects to it is connected to `to`, and sends at most so many Mbit/s.
    pub fn to(to: &str, mbit: u64) -> Result<Self, Error> {
        let io = |source| Error::Io {
            what: "simulate a link".to_owned(),
            source,
        };
        let listener = TcpListener::bind("127.0.0.1:0").map_err(io)?;
        let address = listener.local_addr().map_err(io)?.to_string();
        let to = to.to_owned();
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                // Without the other end it is as if nobody listened.
                if let Ok(far) = TcpStream::connect(&to) {
                    let _ = join(near, far, mbit);
                }
            }
        });
        Ok(Self { address })
    }

    /// Where to connect to.
    pub fn address(&self) -> &str {
        &self.address
    }
}

fn join(near: TcpStream, far: TcpStream, mbit: u64) -> std::io::Result<()> {
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let back = (far.try_clone()?, near.try_clone()?);
    thread::spawn(move || pass(near, far, Some(mbit)));
    thread::spawn(move || pass(back.0, back.1, None));
    Ok(())
}

fn pass(mut from: TcpStream, mut to: TcpStream, mbit: Option<u64>) {
    let mut bytes = [0; PIECE];
    let mut idle_at = Instant::now();
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        if let Some(mbit) = mbit {
            idle_at = idle_at.max(Instant::now()) + takes(count, mbit);
            let left = idle_at.saturating_duration_since(Instant::now());
            if left >= SHORTEST {
                thread::sleep(left);
            }
        }
        if to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    // Who has closed one end has closed both.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// How long so many bytes take.
fn takes(bytes: usize, mbit: u64) -> Duration {
    Duration::from_nanos(bytes as u64 * 8_000 / mbit.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_comes_out_in_order_and_no_faster_than_the_rate() {
        const MBIT: u64 = 80;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let link = Link::to(&listener.local_addr().unwrap().to_string(), MBIT).unwrap();
        let sent: Vec<u8> = (0..200_000u32).map(|n| (n / 7) as u8).collect();
        let mut near = TcpStream::connect(link.address()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        let bytes = sent.clone();
        let started = Instant::now();
        let sender = thread::spawn(move || {
            near.write_all(&bytes).unwrap();
            near
        });
        let mut got = vec![0; sent.len()];
        far.read_exact(&mut got).unwrap();
        let took = started.elapsed();
        assert!(got == sent);
        assert!(took + SHORTEST >= takes(sent.len(), MBIT), "{took:?}");
        // The other way, and its end.
        far.write_all(b"ack").unwrap();
        let mut near = sender.join().unwrap();
        let mut ack = [0; 3];
        near.read_exact(&mut ack).unwrap();
        assert_eq!(&ack, b"ack");
        drop(near);
        assert_eq!(far.read(&mut ack).unwrap(), 0);
    }
}
