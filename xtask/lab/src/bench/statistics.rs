//! Medians and ratios of rounds.

/// Where values of several rounds lie.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub(super) struct Range {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

// === impl Range ===

impl Range {
    /// That of `values`; `None` of none.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let half = values.len() / 2;
        let upper = *values.get(half)?;
        let median = match values.len() % 2 {
            0 => f64::midpoint(values[half - 1], upper),
            _ => upper,
        };
        Some(Self { median, min: *values.first()?, max: *values.last()? })
    }

    /// That of the ratios within each round: what disturbs a whole round disturbs both of its sides.
    pub(super) fn of_ratios(values: &[f64], to: &[f64]) -> Option<Self> {
        Self::of(values.iter().zip(to).map(|(value, to)| value / to))
    }
}

/// In which order the `count` places of a round take their turn: each round starts elsewhere, every other one goes
/// backwards, so that no way is always after the same one.
pub(super) fn order(count: usize, round: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    // Half of them plus one apart, so that starts are spread from the first rounds on.
    let start = (round as usize * (count / 2 + 1)).checked_rem(count).unwrap_or(0);
    order.rotate_left(start);
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(median: f64, min: f64, max: f64) -> Option<Range> {
        Some(Range { median, min, max })
    }

    #[test]
    fn median_is_the_middle_or_between_the_two() {
        assert_eq!(Range::of([]), None);
        assert_eq!(Range::of([5.0]), range(5.0, 5.0, 5.0));
        assert_eq!(Range::of([9.0, 1.0, 2.0]), range(2.0, 1.0, 9.0));
        assert_eq!(Range::of([9.0, 1.0, 2.0, 4.0]), range(3.0, 1.0, 9.0));
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        // The medians' own ratio would be 1.
        assert_eq!(Range::of_ratios(&[1.0, 20.0, 3.0], &[2.0, 10.0, 3.0]), range(1.0, 0.5, 2.0));
        assert_eq!(Range::of_ratios(&[3.0, 8.0], &[1.0, 2.0]), range(3.5, 3.0, 4.0));
    }

    #[test]
    fn every_place_has_its_turn_in_every_round() {
        for round in 0..9 {
            let mut turns = order(6, round);
            turns.sort_unstable();
            assert_eq!(turns, [0, 1, 2, 3, 4, 5], "round {round}");
        }
        assert_ne!(order(6, 0)[0], order(6, 2)[0]);
        assert_eq!(order(0, 3), Vec::<usize>::new());
    }
}
