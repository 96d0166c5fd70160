//! Numbers of bytes and paths of sockets, as people write them.

use kvm_demand_paging::PageRange;
use std::path::PathBuf;

/// Reads a number of bytes: `4096`, `64K`, `128M`, `2G` or `1T`, in powers of 1024.
pub fn bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        Some(b'T' | b't') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| {
            format!("'{text}' is no number of bytes: write it like 4096, 64K, 128M or 2G")
        })
}

/// Reads `unix:PATH`.
pub fn unix(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Ok(path.into()),
        _ => Err(format!(
            "'{text}' is no Unix socket: write it like unix:/run/kdp.sock"
        )),
    }
}

/// Reads `SLOT:OFFSET`: where in the source a memslot begins, in bytes.
pub fn layout(text: &str) -> Result<(u32, u64), String> {
    let wrong =
        || format!("'{text}' is no place of a memslot: write SLOT:OFFSET, like 0:0 or 1:2G");
    let (slot, offset) = text.split_once(':').ok_or_else(wrong)?;
    let offset = bytes(offset)?;
    if offset % 4096 != 0 {
        return Err(format!(
            "the offset {offset} of '{text}' is not a multiple of 4096 bytes"
        ));
    }
    Ok((slot.parse().map_err(|_| wrong())?, offset))
}

/// Reads `PAGE` or `PAGE+COUNT`: pages of a memslot.
pub fn pages(text: &str) -> Result<PageRange, String> {
    let (first, count) = text.split_once('+').unwrap_or((text, "1"));
    match (first.parse(), count.parse()) {
        (Ok(first), Ok(count)) if count > 0 => Ok(PageRange::new(first, count)),
        _ => Err(format!(
            "'{text}' names no pages: write PAGE or PAGE+COUNT, like 7 or 512+20"
        )),
    }
}

/// A number of bytes with a unit.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = "bytes";
    for larger in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    match unit {
        "bytes" => format!("{bytes} bytes"),
        _ => format!("{value:.1} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_a_memslot() {
        assert_eq!(pages("7"), Ok(PageRange::page(7)));
        assert_eq!(pages("512+20"), Ok(PageRange::new(512, 20)));
        for bad in ["", "x", "7+", "+7", "7+0", "-1", "1+2+3"] {
            assert!(pages(bad).unwrap_err().contains(bad), "{bad}");
        }
    }

    #[test]
    fn numbers() {
        assert_eq!(bytes("4096"), Ok(4096));
        assert_eq!(bytes("128M"), Ok(128 << 20));
        assert_eq!(bytes("1T"), Ok(1 << 40));
        for bad in ["", "M", "-1", "1.5G", "99999999999T", "12X", "é"] {
            assert!(bytes(bad).unwrap_err().contains(bad), "{bad}");
        }
        assert_eq!(layout("1:8K"), Ok((1, 8192)));
        for bad in ["1", "x:0", "1:100", ":0"] {
            assert!(layout(bad).is_err(), "{bad}");
        }
        assert_eq!(unix("unix:/x"), Ok("/x".into()));
        assert!(unix("/x").is_err());
    }

    #[test]
    fn units() {
        assert_eq!(human(100), "100 bytes");
        assert_eq!(human(3 << 19), "1.5 MiB");
        assert_eq!(human(5 << 50), "5120.0 TiB");
    }
}
