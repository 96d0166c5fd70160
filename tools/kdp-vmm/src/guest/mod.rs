//! Guest programs: position-independent 64-bit code with its parameters.
//!
//! A program starts in long mode at CPL 0, with all of guest physical memory mapped one to one, interrupts
//! off and no IDT: an exception is a triple fault, which [`Vcpu::run`](crate::Vcpu::run) reports with its
//! rip. The registers at its start:
//!
//! | register | holds |
//! |---|---|
//! | rdi | the address of the parameters, an array of 64-bit words |
//! | rsi | the vCPU's number |
//! | rsp | the top of a stack of 4 KiB |
//!
//! It talks to the VMM by writing to I/O ports ([`PORT_START`] and so on) and ends with `hlt`.

mod clock;
mod order;
mod revisit;
mod touch;

use std::borrow::Cow;

pub use clock::{Clock, ClockReport};
pub use order::Order;
pub use revisit::Revisit;
pub use touch::{page_hash, Touch, BLOCK, HASH_FACTOR};

/// `out`: the vCPU is ready; the VMM lets it go on when all the others are.
pub const PORT_START: u16 = 0x10;
/// `out`: one more unit of work is done; eax is for the VMM to see.
pub const PORT_TICK: u16 = 0x11;
/// `out`: the program reports the value in rax.
pub const PORT_REPORT: u16 = 0x12;
/// `out`: nothing; for measuring what a round trip to the VMM costs.
pub const PORT_ECHO: u16 = 0x13;

/// What a vCPU executes: code, and the parameters that it finds at rdi.
#[derive(Clone, Debug)]
pub struct GuestProgram {
    code: Cow<'static, [u8]>,
    params: Vec<u64>,
}

impl GuestProgram {
    /// A program from machine code that runs at any address; see [`guest_code!`](crate::guest_code).
    pub fn new(code: impl Into<Cow<'static, [u8]>>) -> Self {
        Self {
            code: code.into(),
            params: Vec::new(),
        }
    }

    /// Append a parameter: the first is where rdi points, the next 8 bytes further, and so on.
    #[must_use]
    pub fn param(mut self, value: u64) -> Self {
        self.params.push(value);
        self
    }

    /// Append parameters.
    #[must_use]
    pub fn params(mut self, values: &[u64]) -> Self {
        self.params.extend_from_slice(values);
        self
    }

    /// A program that writes `count` times to [`PORT_ECHO`].
    pub fn echo(count: u64) -> Self {
        let code = crate::guest_code!(
            "mov rcx, [rdi]",
            "out {start}, al",
            "2: out {echo}, al",
            "dec rcx",
            "jnz 2b",
            "hlt";
            start = PORT_START, echo = PORT_ECHO
        );
        Self::new(code).param(count)
    }

    pub(crate) fn code(&self) -> &[u8] {
        &self.code
    }

    pub(crate) fn param_bytes(&self) -> Vec<u8> {
        self.params.iter().flat_map(|p| p.to_le_bytes()).collect()
    }
}

/// Assemble guest code (Intel syntax) and give it as a `&'static [u8]`.
///
/// Lines first, then, after a semicolon, constants that they name in braces. Labels are numbers below 9000
/// (`2:`, `2b`, `3f`). The code is copied into the guest, so that it may refer to nothing outside itself.
///
/// ```
/// use kdp_vmm::{guest_code, GuestProgram, PORT_REPORT};
///
/// // Reports what is at the address given as the first parameter.
/// let peek = guest_code!(
///     "mov rsi, [rdi]",
///     "mov rax, [rsi]",
///     "out {report}, al",
///     "hlt";
///     report = PORT_REPORT
/// );
/// let program = GuestProgram::new(peek).param(0x4000_0000);
/// ```
#[macro_export]
macro_rules! guest_code {
    ($($line:expr),+ $(,)? $(; $($name:ident = $value:expr),* $(,)?)?) => {{
        let (start, end): (*const u8, *const u8);
        // SAFETY: the block computes two addresses and touches neither memory nor flags; the code between
        // them goes to a section of data and is not executed here.
        unsafe {
            ::core::arch::asm!(
                ".pushsection .rodata.guest_code, \"a\", @progbits",
                "9001:",
                $($line,)+
                "9002:",
                ".popsection",
                "lea {guest_start}, [rip + 9001b]",
                "lea {guest_end}, [rip + 9002b]",
                guest_start = out(reg) start,
                guest_end = out(reg) end,
                $($($name = const $value,)*)?
                options(pure, nomem, nostack, preserves_flags),
            )
        };
        let len = end as usize - start as usize;
        // SAFETY: the two labels enclose `len` bytes of read-only data, which live as long as the program.
        let code: &'static [u8] = unsafe { ::core::slice::from_raw_parts(start, len) };
        code
    }};
}
