//! The processor's cores for work on the host that is neither the engine's nor the scheduler's.

/// `work` on each item and its index, on all cores; the results in order.
pub(crate) fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(usize, &T) -> R + Sync) -> Vec<R> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let size = items.len().div_ceil(threads).max(1);
    let work = &work;
    std::thread::scope(|scope| {
        let parts: Vec<_> = items
            .chunks(size)
            .enumerate()
            .map(|(part, items)| {
                scope.spawn(move || {
                    items.iter().enumerate().map(|(i, item)| work(part * size + i, item)).collect::<Vec<R>>()
                })
            })
            .collect();
        parts
            .into_iter()
            .flat_map(|part| part.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order() {
        for count in [0, 1, 2, 7, 1000] {
            let items: Vec<usize> = (0..count).map(|i| i * 3).collect();
            assert_eq!(in_parallel(&items, |index, &item| item + index), (0..count).map(|i| i * 4).collect::<Vec<_>>());
        }
    }
}
