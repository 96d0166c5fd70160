//! A guest made of threads. Every page that it writes carries its number, a sequence number and bytes that follow from
//! both; before it uses a page it looks whether those are what it wrote last. It frees pages and uses them again, and
//! tells the balloon of free ones, late.

use std::collections::VecDeque;

pub const PAGE: usize = 4096;

/// Where the guest's memory is. `Err`: the memory failed, and the vCPU stops.
pub trait Memory {
    fn read(&self, page: u64, bytes: &mut [u8; PAGE]) -> Result<(), String>;
    fn write(&self, page: u64, bytes: &[u8; PAGE]) -> Result<(), String>;
    /// The epoch that the balloon shows.
    fn epoch(&self) -> Option<u32>;
    fn hint(&self, epoch: u32, page: u64);
}

/// What a page holds after `sequence` writes; it was zeros before the first.
pub fn content(page: u64, sequence: u32) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    if sequence == 0 {
        return bytes;
    }
    let mut state = (page << 32) | u64::from(sequence);
    for word in bytes.chunks_exact_mut(8) {
        state = next(state);
        word.copy_from_slice(&state.to_le_bytes());
    }
    bytes[..8].copy_from_slice(&page.to_le_bytes());
    bytes[8..12].copy_from_slice(&sequence.to_le_bytes());
    bytes
}

pub fn next(state: u64) -> u64 {
    // splitmix64
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A vCPU: its state is all that it knows of its pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vcpu {
    pub first: u64,
    random: u64,
    // For each page: how often it was written, and whether it is in use.
    pages: Vec<(u32, bool)>,
    // Found free under an epoch, and not told yet.
    late: VecDeque<(u32, u64)>,
}

impl Vcpu {
    pub fn new(first: u64, count: u64, seed: u64) -> Self {
        Self {
            first,
            random: next(seed),
            pages: vec![(0, true); count as usize],
            late: VecDeque::new(),
        }
    }

    fn random(&mut self, below: u64) -> u64 {
        self.random = next(self.random);
        self.random % below
    }

    /// Look whether a page is what was written last.
    fn verify(&self, page: u64, memory: &dyn Memory) -> Result<(), String> {
        let (sequence, used) = self.pages[(page - self.first) as usize];
        let mut bytes = [0; PAGE];
        memory.read(page, &mut bytes)?;
        if used && bytes != content(page, sequence) {
            let found = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
            return Err(format!(
                "page {page}: write {sequence} is lost, write {found} is there"
            ));
        }
        Ok(())
    }

    pub fn verify_all(&self, memory: &dyn Memory) -> Result<(), String> {
        (self.first..self.first + self.pages.len() as u64)
            .filter(|page| self.pages[(page - self.first) as usize].1)
            .try_for_each(|page| self.verify(page, memory))
    }

    /// Some work.
    pub fn step(&mut self, memory: &dyn Memory) -> Result<(), String> {
        let at = self.random(self.pages.len() as u64) as usize;
        let page = self.first + at as u64;
        if self.pages[at].1 {
            self.verify(page, memory)?;
        }
        match self.random(8) {
            // It is freed, and found free after the epoch was seen; the balloon is told at some later time.
            0 | 1 => {
                self.pages[at].1 = false;
                if let Some(epoch) = memory.epoch() {
                    self.late.push_back((epoch, page));
                }
            }
            2..=4 => {
                self.pages[at].0 += 1;
                memory.write(page, &content(page, self.pages[at].0))?;
                self.pages[at].1 = true;
            }
            _ => {}
        }
        if self.late.len() > 8 || self.random(4) == 0 {
            if let Some((epoch, page)) = self.late.pop_front() {
                memory.hint(epoch, page);
            }
        }
        Ok(())
    }

    pub fn save(&self, to: &mut Vec<u8>) {
        to.extend(self.first.to_le_bytes());
        to.extend(self.random.to_le_bytes());
        to.extend((self.pages.len() as u64).to_le_bytes());
        for (sequence, used) in &self.pages {
            to.extend(sequence.to_le_bytes());
            to.push((*used).into());
        }
    }

    pub fn restore(from: &mut &[u8]) -> Self {
        fn take<const N: usize>(from: &mut &[u8]) -> [u8; N] {
            let (head, rest) = from.split_first_chunk().unwrap();
            *from = rest;
            *head
        }
        let [first, random, count] = [(); 3].map(|()| u64::from_le_bytes(take(from)));
        let pages = (0..count)
            .map(|_| (u32::from_le_bytes(take(from)), take::<1>(from)[0] == 1))
            .collect();
        Self {
            first,
            random,
            pages,
            late: VecDeque::new(),
        }
    }
}
