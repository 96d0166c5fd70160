//! Tables for the terminal.

/// A table with this head; all columns but the first `left` are aligned to the right.
pub fn table(head: &[&str], left: usize, rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        let widest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
        widest.max(head[column].chars().count())
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: &[String]| {
        let cells = cells
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(column, (cell, &width))| {
                if column < left {
                    format!("{cell:<width$}")
                } else {
                    format!("{cell:>width$}")
                }
            });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
    let rule: Vec<String> = widths.iter().map(|&width| "─".repeat(width)).collect();
    let body = rows.iter().map(|row| line(row));
    [line(&head), line(&rule)].into_iter().chain(body).collect()
}

/// A number with three digits that count, or as a whole number with separators if it is large.
pub fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 1000.0 => thousands(value.round() as i64),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 || v == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// 1234567 as 1,234,567.
pub fn thousands(value: i64) -> String {
    let digits = value.unsigned_abs().to_string();
    let mut out = if value < 0 {
        "-".to_owned()
    } else {
        String::new()
    };
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(number(1_234_567.4), "1,234,567");
        assert_eq!(number(279.3), "279");
        assert_eq!(number(38.25), "38.2");
        assert_eq!(number(2.345), "2.35");
        assert_eq!(number(0.01234), "0.012");
        assert_eq!(thousands(-1000), "-1,000");
        assert_eq!(thousands(999), "999");
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [
            vec!["a".into(), "1".into()],
            vec!["bcd".into(), "22".into()],
        ];
        assert_eq!(
            table(&["x", "n"], 1, &rows),
            "x     n\n───  ──\na     1\nbcd  22\n"
        );
    }
}
