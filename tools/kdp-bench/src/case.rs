//! What is measured: one guest over one memory.

use kdp_vmm::session::Pattern;
use kdp_vmm::{BackingArg, Mode, PAGE_SIZE};
use serde::{Deserialize, Serialize};

use kvm_demand_paging::Backing;

/// A guest's run. Goes to the process that measures it as JSON.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Case {
    #[serde(with = "by_name")]
    pub mode: Mode,
    #[serde(with = "by_name")]
    pub backing: BackingArg,
    #[serde(with = "by_name")]
    pub pattern: Pattern,
    pub vcpus: u64,
    /// Handler threads that faults go to; 0 in modes without.
    pub readers: u64,
    /// Guest memory.
    pub bytes: u64,
    /// Visit only so many pages, in blocks that are spread over the memory.
    pub visit: Option<u64>,
    /// The simulated link that the contents come over, in Gbit/s.
    pub link_gbit: Option<u64>,
    /// The rounds over completed memory, of which the median is taken; 0: the round that pages it in.
    pub rounds: u64,
}

impl Case {
    /// One vCPU, one reader if the mode has readers, and all of `bytes` visited.
    pub fn new(mode: Mode, backing: BackingArg, pattern: Pattern, bytes: u64) -> Self {
        Self {
            mode,
            backing,
            pattern,
            vcpus: 1,
            readers: mode.has_readers().into(),
            bytes,
            visit: None,
            link_gbit: None,
            rounds: 0,
        }
    }

    /// The name of its row's mode.
    pub fn name(&self) -> &'static str {
        match (self.rounds, self.mode) {
            (0, mode) => mode.name(),
            (_, Mode::Floor) => "loop-plain",
            _ => "loop-device",
        }
    }

    pub fn backing(&self) -> Backing {
        self.backing.into()
    }

    /// Visit one page in so many: each visit must be a fault.
    pub fn stride(&self) -> u64 {
        let fault = self.mode.fault_bytes(self.backing()) / PAGE_SIZE;
        match (self.link_gbit, self.visit) {
            // One access in each huge page, whatever a fault brings; several where there is only one huge page.
            (Some(_), _) => fault.max((self.bytes / PAGE_SIZE / LINK_VISITS).max(1)),
            (None, Some(_)) => 1,
            (None, None) => fault,
        }
    }

    /// Bytes that one fault brings.
    pub fn fault_bytes(&self) -> u64 {
        self.mode.fault_bytes(self.backing())
    }

    /// For people to read.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{} on {}, {}, {} MiB, {} vCPU",
            self.name(),
            kdp_vmm::backing_name(self.backing()),
            self.pattern.name(),
            self.bytes >> 20,
            self.vcpus
        );
        if self.readers > 1 {
            text += &format!(", {} readers", self.readers);
        }
        if let Some(gbit) = self.link_gbit {
            text += &format!(", {gbit} Gbit/s");
        }
        text
    }
}

/// How many pages a guest visits whose contents come over a link.
const LINK_VISITS: u64 = 8;

/// Values that have names on the command line have the same in JSON.
mod by_name {
    use clap::ValueEnum;
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub fn serialize<T: ValueEnum, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        match value.to_possible_value() {
            Some(value) => to.serialize_str(value.get_name()),
            None => Err(serde::ser::Error::custom("a value without a name")),
        }
    }

    pub fn deserialize<'de, T: ValueEnum, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
        let name = String::deserialize(from)?;
        T::from_str(&name, false).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_survive_json() {
        let case = Case {
            link_gbit: Some(25),
            ..Case::new(
                Mode::Prefetch,
                BackingArg::Huge1G,
                Pattern::Sequential,
                1 << 30,
            )
        };
        let text = serde_json::to_string(&case).unwrap();
        assert!(
            text.contains("\"exit-prefetch\"") && text.contains("\"hugetlb-1G\""),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<Case>(&text).unwrap(), case);
    }

    #[test]
    fn each_visit_is_a_fault() {
        let stride = |mode, link_gbit| {
            let case = Case::new(mode, BackingArg::Huge2M, Pattern::Random, 16 << 20);
            Case { link_gbit, ..case }.stride()
        };
        assert_eq!(stride(Mode::Exit, None), 1);
        assert_eq!(stride(Mode::UffdMissing, None), 512);
        assert_eq!(stride(Mode::Exit, Some(1)), 512);
        let huge = Case::new(
            Mode::UffdMissing,
            BackingArg::Huge1G,
            Pattern::Random,
            1 << 30,
        );
        assert_eq!(
            Case {
                link_gbit: Some(1),
                ..huge
            }
            .stride(),
            1 << 18
        );
    }
}
