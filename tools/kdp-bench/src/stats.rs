//! Medians.

/// The quantiles that are kept of what single accesses took.
pub const QUANTILES: [f64; 23] = [
    0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9,
    0.95, 0.98, 0.99, 0.995, 0.999, 1.0,
];

/// The median; of an even number, the lower of the two in the middle. 0 of nothing.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len().saturating_sub(1) / 2;
    values.get(middle).copied().unwrap_or(0.0)
}

/// The least and the greatest.
pub fn range(values: impl IntoIterator<Item = f64>) -> [f64; 2] {
    let all = [f64::INFINITY, f64::NEG_INFINITY];
    values.into_iter().fold(all, |[least, greatest], value| {
        [least.min(value), greatest.max(value)]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ranges() {
        assert_eq!(median([]), 0.0);
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.0);
        assert_eq!(range([3.0, 1.0, 2.0]), [1.0, 3.0]);
    }

    #[test]
    fn quantiles_are_in_order_and_have_those_that_rows_name() {
        assert!(QUANTILES.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(QUANTILES.contains(&0.5) && QUANTILES.contains(&0.99));
    }
}
