//! A network between the two that breaks.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        atomic::{AtomicBool, AtomicI64, Ordering::SeqCst},
        Arc, Mutex,
    },
    thread,
};

pub struct Proxy {
    pub address: String,
    to: Mutex<SocketAddr>,
    // Bytes until the next cut; each cut takes the next from the list, and after the last there is none.
    left: AtomicI64,
    cuts: Mutex<Vec<i64>>,
    dead: AtomicBool,
    streams: Mutex<Vec<TcpStream>>,
}

impl Proxy {
    /// It cuts all connections after so many bytes in both directions, one number for each cut, the last one first.
    pub fn new(to: SocketAddr, mut cuts: Vec<i64>) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Arc::new(Self {
            address: listener.local_addr().unwrap().to_string(),
            to: Mutex::new(to),
            left: AtomicI64::new(cuts.pop().unwrap_or(i64::MAX)),
            cuts: Mutex::new(cuts),
            dead: AtomicBool::new(false),
            streams: Mutex::default(),
        });
        let me = Arc::clone(&proxy);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(from) = stream else { return };
                if me.dead.load(SeqCst) {
                    continue;
                }
                let to = *me.to.lock().unwrap();
                let Ok(to) = TcpStream::connect(to) else {
                    continue;
                };
                let mut streams = me.streams.lock().unwrap();
                for (a, b) in [(&from, &to), (&to, &from)] {
                    let (me, a, b) = (me.clone(), a.try_clone().unwrap(), b.try_clone().unwrap());
                    thread::spawn(move || me.copy(a, b));
                }
                streams.extend([from, to]);
                if me.dead.load(SeqCst) {
                    drop(streams);
                    me.cut();
                }
            }
        });
        proxy
    }

    fn copy(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = [0; 8192];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let left = self.left.fetch_sub(count as i64, SeqCst);
            // What came before the cut arrives: a frame is torn in the middle.
            let whole = count.min(usize::try_from(left).unwrap_or(0));
            if to.write_all(&buffer[..whole]).is_err() {
                break;
            }
            if whole < count {
                if left > 0 || self.left.load(SeqCst) < 0 {
                    let next = self.cuts.lock().unwrap().pop().unwrap_or(i64::MAX);
                    self.left.store(next, SeqCst);
                }
                self.cut();
                return;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }

    /// All connections end; new ones can be made.
    pub fn cut(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Nobody reaches anybody any more.
    pub fn kill(&self) {
        self.dead.store(true, SeqCst);
        self.cut();
    }

    /// After that: somebody else is there.
    pub fn lead_to(&self, to: SocketAddr) {
        *self.to.lock().unwrap() = to;
        self.dead.store(false, SeqCst);
    }
}
