//! The program that visits the same pages again and again, and knows how long it had to wait for one.

use super::{GuestProgram, PORT_REPORT, PORT_START};
use crate::memory::PAGE_SIZE;

/// Builds a program that reads the first word of each of its pages, in order, over and over, and never ends.
///
/// After each stretch, a number of sweeps over all of them, it makes two reports: the sum of all words that it read,
/// which is the same each time if the pages are, and how long the longest of its visits took, by the TSC.
#[derive(Clone, Copy, Debug)]
pub struct Revisit {
    gpa: u64,
    count: u64,
    stride: u64,
    sweeps: u64,
}

impl Revisit {
    /// Visit `count` pages from this address on.
    pub fn new(gpa: u64, count: u64) -> Self {
        Self {
            gpa,
            count: count.max(1),
            stride: 1,
            sweeps: 1,
        }
    }

    /// Visit only every `pages`th page.
    #[must_use]
    pub fn stride(mut self, pages: u64) -> Self {
        self.stride = pages;
        self
    }

    /// Sweeps in a stretch.
    #[must_use]
    pub fn sweeps(mut self, sweeps: u64) -> Self {
        self.sweeps = sweeps.max(1);
        self
    }

    /// The program.
    pub fn program(&self) -> GuestProgram {
        GuestProgram::new(code()).params(&[
            self.gpa,
            self.count,
            self.stride * PAGE_SIZE,
            self.sweeps,
        ])
    }
}

fn code() -> &'static [u8] {
    crate::guest_code!(
        "out {start}, al",
        "2: xor r10d, r10d",            // the stretch's sum
        "xor r11d, r11d",               // its longest visit
        "mov r9, [rdi + 24]",           // sweeps left

        "3: mov rsi, [rdi]",
        "mov r8, [rdi + 8]",            // pages left

        "4: lfence",
        "rdtsc",
        "shl rdx, 32",
        "or rdx, rax",
        "mov rbx, rdx",
        "mov rcx, [rsi]",
        "lfence",
        "rdtsc",
        "shl rdx, 32",
        "or rdx, rax",
        "sub rdx, rbx",
        "cmp rdx, r11",
        "cmova r11, rdx",
        "add r10, rcx",
        "add rsi, [rdi + 16]",
        "dec r8",
        "jnz 4b",
        "dec r9",
        "jnz 3b",

        "mov rax, r10",
        "out {report}, al",
        "mov rax, r11",
        "out {report}, al",
        "jmp 2b";
        start = PORT_START,
        report = PORT_REPORT,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_fits() {
        assert!(code().len() < PAGE_SIZE as usize);
    }

    #[test]
    fn a_stretch_has_a_page_and_a_sweep_at_least() {
        let program = Revisit::new(1 << 30, 0).stride(64).sweeps(0).program();
        let params = program.param_bytes();
        let words = params.chunks_exact(8).map(|word| word[0]);
        assert_eq!(words.skip(1).collect::<Vec<u8>>(), [1, 0, 1]);
    }
}
