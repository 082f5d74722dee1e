//! Finds stop strings in text that arrives in pieces.

/// Passes text through, holding back only what may still become a stop string.
///
/// The first stop string to be *completed* wins (of several completed by the same character, the longest), so the
/// result depends on the text alone and never on how it was cut into pieces.
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

#[derive(Debug, PartialEq)]
pub(crate) enum Scan {
    /// Text that is certainly not part of a stop string.
    Text(String),
    /// A stop string was completed; the text before it.
    Stopped(String),
}

impl StopMatcher {
    /// `stops` holds no empty string.
    pub fn new(stops: Vec<String>) -> Self {
        StopMatcher { stops, held: String::new() }
    }

    pub fn push(&mut self, piece: &str) -> Scan {
        self.held.push_str(piece);
        if let Some(start) = self.first_match() {
            let mut text = std::mem::take(&mut self.held);
            text.truncate(start);
            return Scan::Stopped(text);
        }
        let undecided = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - undecided);
        Scan::Text(std::mem::replace(&mut self.held, rest))
    }

    /// What is still held back, once no more text can come.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the stop string that ends first begins.
    fn first_match(&self) -> Option<usize> {
        let matches = self.stops.iter().filter_map(|stop| Some((self.held.find(stop)?, stop.len())));
        matches.min_by_key(|&(start, len)| (start + len, start)).map(|(start, _)| start)
    }
}

/// Bytes of the longest end of `text` that `stop` begins with, `stop` as a whole excepted.
///
/// Comparing bytes is enough: both are UTF-8, so an end of one can only equal a beginning of the other at character
/// boundaries.
fn overlap(text: &str, stop: &str) -> usize {
    let (text, stop) = (text.as_bytes(), stop.as_bytes());
    let longest = text.len().min(stop.len() - 1);
    (1..=longest).rev().find(|&len| text.ends_with(&stop[..len])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The text before the stop string that ends first, by trying every end.
    fn naive(text: &str, stops: &[String]) -> (String, bool) {
        for end in 1..=text.len() {
            let longest = stops.iter().filter(|stop| text.as_bytes()[..end].ends_with(stop.as_bytes()));
            if let Some(stop) = longest.max_by_key(|stop| stop.len()) {
                return (text[..end - stop.len()].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    fn stream(pieces: &[String], stops: &[String]) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops.to_vec());
        let mut out = String::new();
        for piece in pieces {
            match matcher.push(piece) {
                Scan::Text(text) => out.push_str(&text),
                Scan::Stopped(text) => return (out + &text, true),
            }
        }
        (out + &matcher.finish(), false)
    }

    proptest! {
        // A small alphabet with characters of one to four bytes makes overlaps and near misses common.
        #[test]
        fn equals_naive_search_however_the_text_is_cut(
            pieces in prop::collection::vec("[abé€𝄞]{0,4}", 0..12),
            stops in prop::collection::vec("[abé€𝄞]{1,5}", 0..4),
        ) {
            prop_assert_eq!(stream(&pieces, &stops), naive(&pieces.concat(), &stops));
        }

        #[test]
        fn holds_back_only_a_beginning_of_a_stop_string(
            pieces in prop::collection::vec("[abc]{0,4}", 0..12),
            stops in prop::collection::vec("[abc]{1,5}", 0..4),
        ) {
            let mut matcher = StopMatcher::new(stops.clone());
            for piece in &pieces {
                if matches!(matcher.push(piece), Scan::Stopped(_)) {
                    break;
                }
                let held = &matcher.held;
                prop_assert!(held.is_empty() || stops.iter().any(|s| s.starts_with(held) && s.len() > held.len()));
            }
        }
    }

    #[test]
    fn text_passes_at_once_when_nothing_can_match() {
        let mut matcher = StopMatcher::new(vec!["\n\n".into()]);
        assert_eq!(matcher.push("one\n"), Scan::Text("one".into()));
        assert_eq!(matcher.push("two"), Scan::Text("\ntwo".into()));
        assert_eq!(matcher.push("\n"), Scan::Text("".into()));
        assert_eq!(matcher.push("\nthree"), Scan::Stopped("".into()));
    }
}
