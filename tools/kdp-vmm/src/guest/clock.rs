//! The program that reads kvmclock: memory that KVM itself writes.

use super::{GuestProgram, PORT_REPORT, PORT_START};

/// MSR_KVM_SYSTEM_TIME_NEW.
const MSR_SYSTEM_TIME: u32 = 0x4b56_4d01;

/// Builds a program that turns kvmclock on, with its page at an address of the caller's choice, and reads
/// it many times.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    gpa: u64,
    reads: u64,
}

impl Clock {
    /// The clock's page is at `gpa`; read the clock `reads` times.
    pub fn new(gpa: u64, reads: u64) -> Self {
        Self {
            gpa,
            reads: reads.max(1),
        }
    }

    /// The program. Its reports make a [`ClockReport`].
    pub fn program(&self) -> GuestProgram {
        GuestProgram::new(code()).params(&[self.gpa, self.reads])
    }
}

/// What the guest saw of its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockReport {
    /// Nanoseconds at the first reading.
    pub first_ns: u64,
    /// Nanoseconds at the last reading.
    pub last_ns: u64,
    /// Readings that were before their predecessor.
    pub backwards: u64,
    /// The structure's version at the end: even, and not 0 once KVM has written it.
    pub version: u64,
    /// Its flags.
    pub flags: u64,
    /// Its factor from TSC to time: 0 if KVM never wrote it.
    pub factor: u64,
}

impl ClockReport {
    /// From the values that the program reported.
    pub fn from_reports(reports: &[u64]) -> Option<Self> {
        let &[first_ns, last_ns, backwards, version, flags, factor] = reports else {
            return None;
        };
        Some(Self {
            first_ns,
            last_ns,
            backwards,
            version,
            flags,
            factor,
        })
    }

    /// Did the clock work: written by KVM, never backwards, and in the end ahead of its start.
    pub fn works(&self) -> bool {
        self.factor != 0
            && self.version != 0
            && self.version % 2 == 0
            && self.backwards == 0
            && self.last_ns > self.first_ns
    }
}

fn code() -> &'static [u8] {
    crate::guest_code!(
        "out {start}, al",
        "mov rsi, [rdi]",               // struct pvclock_vcpu_time_info
        "mov r9, [rdi + 8]",            // readings left
        "mov rax, rsi",
        "or rax, 1",
        "mov rdx, rax",
        "shr rdx, 32",
        "mov ecx, {msr}",
        "wrmsr",
        "xor r12d, r12d",               // the first reading
        "xor r13d, r13d",               // the one before
        "xor r14d, r14d",               // readings that went backwards

        // One reading, again while KVM is writing (odd version) or has written (version changed).
        "2: mov r8d, [rsi]",
        "test r8d, 1",
        "jnz 2b",
        "lfence",
        "rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "sub rax, [rsi + 8]",
        "mov ecx, [rsi + 28]",
        "movsx ecx, cl",
        "test ecx, ecx",
        "js 3f",
        "shl rax, cl",
        "jmp 4f",
        "3: neg ecx",
        "shr rax, cl",
        "4: mov edx, [rsi + 24]",
        "mul rdx",
        "shrd rax, rdx, 32",
        "add rax, [rsi + 16]",
        "lfence",
        "cmp r8d, [rsi]",
        "jne 2b",

        "test r12, r12",
        "cmovz r12, rax",
        "cmp rax, r13",
        "jae 5f",
        "inc r14",
        "5: mov r13, rax",
        "dec r9",
        "jnz 2b",

        "mov rax, r12",
        "out {report}, al",
        "mov rax, r13",
        "out {report}, al",
        "mov rax, r14",
        "out {report}, al",
        "mov eax, r8d",
        "out {report}, al",
        "movzx eax, byte ptr [rsi + 29]",
        "out {report}, al",
        "mov eax, [rsi + 24]",
        "out {report}, al",
        "hlt";
        start = PORT_START,
        report = PORT_REPORT,
        msr = MSR_SYSTEM_TIME,
    )
}
