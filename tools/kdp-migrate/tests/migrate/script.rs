//! A destination that does what its test tells it, message by message.

use crate::{vm::PAGES, wait_for};
use kdp_migrate::{
    wire::{self, Had, Message, MigrationId, Stage},
    PageSet,
};
use kvm_demand_paging::PageRange;
use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    time::Duration,
};

pub struct Script {
    stream: TcpStream,
    input: Vec<u8>,
    // Numbers of the next frames.
    out: u16,
    next: u16,
    frames: u64,
}

/// What a test looks for.
#[derive(Debug, PartialEq)]
pub enum Told {
    Pages(PageRange),
    Prepare,
    Go,
    AllSent,
    Bye,
    Error(u32),
    Closed,
}

impl Script {
    /// The next connection, up to its hello.
    pub fn accept(listener: &TcpListener) -> (Self, MigrationId, bool) {
        listener.set_nonblocking(true).unwrap();
        let mut stream = None;
        wait_for("a connection", || {
            stream = listener.accept().ok();
            stream.is_some()
        });
        let (stream, _) = stream.unwrap();
        stream.set_nonblocking(false).unwrap();
        let timeout = Some(Duration::from_secs(20));
        stream.set_read_timeout(timeout).unwrap();
        let mut script = Self {
            stream,
            input: Vec::new(),
            out: 0,
            next: 0,
            frames: 0,
        };
        loop {
            if let Some((message, len)) = wire::decode(&script.input, script.next).unwrap() {
                let Message::Hello { id, resume, .. } = message else {
                    panic!("{message:?} instead of a greeting");
                };
                script.input.drain(..len);
                script.next = script.next.wrapping_add(1);
                return (script, id, resume);
            }
            assert!(script.read() > 0, "there was no greeting");
        }
    }

    pub fn send(&mut self, message: &Message<'_>) {
        let mut bytes = Vec::new();
        wire::encode(message, self.out, &mut bytes);
        self.out = self.out.wrapping_add(1);
        // The other side may have closed it.
        let _ = self.stream.write_all(&bytes);
    }

    /// Greet as an engine that took the place of another, and told of `count` pages that are here.
    pub fn take_over(&mut self, id: MigrationId, here: &PageSet, count: u64) {
        for (first, word) in (0..).step_by(64).zip(here.words()) {
            let words = vec![*word];
            self.send(&Message::Here { first, words });
        }
        let (stage, had) = (Stage::Running, Had::Pages(count));
        self.send(&Message::Welcome { id, stage, had });
    }

    pub fn welcome(&mut self, id: MigrationId) {
        let (stage, had) = (Stage::Copying, Had::Frames(0));
        self.send(&Message::Welcome { id, stage, had });
    }

    /// The next message that matters. Every frame of pages is acked.
    pub fn hear(&mut self) -> Told {
        loop {
            let Some((message, len)) = wire::decode(&self.input, self.next).unwrap() else {
                if self.read() == 0 {
                    return Told::Closed;
                }
                continue;
            };
            let (mut acks, mut told) = (false, None);
            match message {
                Message::Pages { pages, .. } => {
                    self.frames += 1;
                    (acks, told) = (true, Some(Told::Pages(pages)));
                }
                Message::Ping => acks = true,
                Message::Prepare { .. } => told = Some(Told::Prepare),
                Message::Go => told = Some(Told::Go),
                Message::AllSent => told = Some(Told::AllSent),
                Message::Bye => told = Some(Told::Bye),
                Message::Error { code, .. } => told = Some(Told::Error(code)),
                Message::Map { .. } | Message::State { .. } => {}
                message => panic!("{message:?}"),
            }
            self.input.drain(..len);
            self.next = self.next.wrapping_add(1);
            if acks {
                self.send(&Message::Ack(self.frames));
            }
            if let Some(told) = told {
                return told;
            }
        }
    }

    /// The pages of so many frames, none of which may have come before; fewer if that was all.
    pub fn pages(&mut self, frames: usize, here: &mut PageSet) {
        for _ in 0..frames {
            match self.hear() {
                Told::Pages(pages) => {
                    let new = here.insert_range(pages);
                    assert_eq!(new, pages.count, "{pages:?} came twice");
                    assert!(pages.end() <= PAGES);
                }
                told => {
                    assert_eq!(told, Told::AllSent);
                    return;
                }
            }
        }
    }

    fn read(&mut self) -> usize {
        let mut buffer = [0; 65536];
        let count = self.stream.read(&mut buffer).unwrap_or(0);
        self.input.extend(&buffer[..count]);
        count
    }
}
