//! Which endpoint of many: locality ranks and the weighted random choice.

use rand::{Rng, RngExt};

/// How far `matches` agree, scope by scope, from the most significant one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rank {
    /// Higher is nearer; comparable for one list of scopes only.
    pub(super) value: usize,
    /// Every scope agrees.
    pub(super) complete: bool,
}

/// Ranks one endpoint. `scopes` tells for each scope, in order, whether source and endpoint agree;
/// `network_first` tells whether the first one is the network.
///
/// The rank is the number of leading agreements. A leading network scope is special: an endpoint
/// on another network is still ranked by the remaining scopes, and one on the same network gets
/// enough on top to stay ahead of all of those.
pub(super) fn rank(mut scopes: impl ExactSizeIterator<Item = bool>, network_first: bool) -> Rank {
    let count = scopes.len();
    let mut value = 0;
    let mut extra = 0;
    if network_first && scopes.next() == Some(true) {
        value = 1;
        extra = count - 1;
    }
    value += scopes.take_while(|agrees| *agrees).count();
    Rank {
        value: value + extra,
        complete: value == count,
    }
}

/// Chooses one of the offered items with probability proportional to its weight, among those of
/// the highest rank, in one pass and without remembering the others.
///
/// After a total weight of `T` the choice stays until the total passes `T / u` for a uniform `u`:
/// the chance to keep it up to a total of `S` is then `T / S`, as it must be, and the random
/// numbers drawn grow with the logarithm of the total instead of the number of items.
#[derive(Debug)]
pub(super) struct Choice<T> {
    chosen: Option<T>,
    rank: usize,
    total: f64,
    keep_until: f64,
}

impl<T> Choice<T> {
    pub(super) fn new() -> Self {
        Self {
            chosen: None,
            rank: 0,
            total: 0.0,
            keep_until: 0.0,
        }
    }

    /// Offers `item`. An item of weight 0 is never chosen and does not hide lower ranks.
    pub(super) fn offer(&mut self, item: T, weight: u32, rank: usize, rng: &mut impl Rng) {
        if weight == 0 || (self.chosen.is_some() && rank < self.rank) {
            return;
        }
        if rank > self.rank {
            self.rank = rank;
            self.total = 0.0;
            self.keep_until = 0.0;
        }
        self.total += f64::from(weight);
        if self.total > self.keep_until {
            self.keep_until = self.total / rng.random::<f64>();
            self.chosen = Some(item);
        }
    }

    pub(super) fn into_chosen(self) -> Option<T> {
        self.chosen
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;

    fn choose(offers: &[(u32, usize)], rng: &mut SmallRng) -> Option<usize> {
        let mut choice = Choice::new();
        for (index, (weight, rank)) in offers.iter().enumerate() {
            choice.offer(index, *weight, *rank, rng);
        }
        choice.into_chosen()
    }

    #[test]
    fn ranks_as_the_table_says() {
        let cases = [
            ([true, true, true], 5),
            ([true, true, false], 4),
            ([true, false, true], 3),
            ([true, false, false], 3),
            ([false, true, true], 2),
            ([false, true, false], 1),
            ([false, false, true], 0),
            ([false, false, false], 0),
        ];
        for (agreements, value) in cases {
            let rank = rank(agreements.into_iter(), true);
            assert_eq!(rank.value, value, "{agreements:?}");
            assert_eq!(rank.complete, agreements == [true; 3], "{agreements:?}");
        }
    }

    proptest! {
        #[test]
        fn without_a_leading_network_the_rank_counts_leading_agreements(
            agreements in proptest::collection::vec(any::<bool>(), 0..6),
        ) {
            let leading = agreements.iter().position(|agrees| !agrees).unwrap_or(agreements.len());
            let rank = rank(agreements.iter().copied(), false);
            prop_assert_eq!(rank.value, leading);
            prop_assert_eq!(rank.complete, leading == agreements.len());
        }

        #[test]
        fn any_endpoint_of_the_same_network_goes_before_every_remote_one(
            near in proptest::collection::vec(any::<bool>(), 0..5),
            far in proptest::collection::vec(any::<bool>(), 0..5),
        ) {
            let length = near.len().min(far.len());
            let rank_of = |same: bool, rest: &[bool]| {
                let all: Vec<bool> = std::iter::once(same).chain(rest[..length].iter().copied()).collect();
                rank(all.into_iter(), true)
            };
            prop_assert!(rank_of(true, &near).value > rank_of(false, &far).value || length == 0);
            prop_assert!(!rank_of(false, &far).complete);
        }

        #[test]
        fn chooses_a_weighted_item_of_the_highest_rank(
            offers in proptest::collection::vec((0..4_u32, 0..3_usize), 0..12),
            seed in any::<u64>(),
        ) {
            let best = offers.iter().filter(|(weight, _)| *weight > 0).map(|(_, rank)| *rank).max();
            match choose(&offers, &mut SmallRng::seed_from_u64(seed)) {
                None => prop_assert_eq!(best, None),
                Some(index) => {
                    prop_assert!(offers[index].0 > 0);
                    prop_assert_eq!(Some(offers[index].1), best);
                }
            }
        }
    }

    #[test]
    fn chooses_in_proportion_to_the_weights() {
        let offers = [(9, 0), (1, 1), (0, 2), (3, 1), (6, 1)];
        let mut rng = SmallRng::seed_from_u64(7);
        let mut hits = [0_u32; 5];
        for _ in 0..20_000 {
            hits[choose(&offers, &mut rng).unwrap()] += 1;
        }
        assert_eq!((hits[0], hits[2]), (0, 0));
        for (index, share) in [(1, 2_000), (3, 6_000), (4, 12_000)] {
            assert!(hits[index].abs_diff(share) < 400, "{hits:?}");
        }
    }
}
