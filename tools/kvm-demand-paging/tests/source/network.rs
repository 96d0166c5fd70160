//! A network that makes trouble.

use kvm_demand_paging::source::Address;
use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering},
        Arc,
    },
    thread,
};

/// Numbers that look random and are the same every time.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// What the network does with a connection.
#[derive(Clone, Copy)]
pub enum Trouble {
    Cut,
    Damage,
    Stall,
}

/// A network between a client and a server that makes trouble after some thousands of bytes.
pub struct Network {
    pub address: Address,
    /// Whether new connections get no trouble.
    pub calm: Arc<AtomicBool>,
    /// How often it has made trouble.
    pub troubles: Arc<AtomicU64>,
}

impl Network {
    pub fn start(server: String, trouble: Trouble, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp(listener.local_addr().unwrap().to_string());
        let calm = Arc::new(AtomicBool::new(false));
        let troubles = Arc::new(AtomicU64::new(0));
        let network = Self {
            address,
            calm: Arc::clone(&calm),
            troubles: Arc::clone(&troubles),
        };
        thread::spawn(move || {
            let mut numbers = Numbers(seed);
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(&server) else {
                    return;
                };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let ends = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let after = match calm.load(Ordering::Relaxed) {
                        true => u64::MAX,
                        // A stall costs a timeout each.
                        false if matches!(trouble, Trouble::Stall) => 1 + numbers.below(400_000),
                        false => 1 + numbers.below(60_000),
                    };
                    let troubles = Arc::clone(&troubles);
                    thread::spawn(move || carry(ends.0, ends.1, trouble, after, &troubles));
                }
            }
        });
        network
    }
}

/// Carry bytes until the one that trouble is made with.
fn carry(
    mut from: TcpStream,
    mut to: TcpStream,
    trouble: Trouble,
    after: u64,
    troubles: &AtomicU64,
) {
    let mut buffer = [0; 4096];
    let mut left = after;
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        if len as u64 >= left {
            troubles.fetch_add(1, Ordering::Relaxed);
            let at = left as usize - 1;
            match trouble {
                Trouble::Cut => {
                    let _ = to.write_all(&buffer[..at]);
                    break;
                }
                Trouble::Damage => buffer[at] ^= 0x10,
                // The other side waits for what never comes.
                Trouble::Stall => {
                    let _ = to.write_all(&buffer[..at]);
                    while matches!(from.read(&mut buffer), Ok(1..)) {}
                    break;
                }
            }
            left = u64::MAX;
        }
        left -= len as u64;
        if to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
