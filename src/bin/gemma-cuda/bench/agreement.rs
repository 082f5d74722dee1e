//! Whether two configurations generate the same tokens.
//!
//! Sums of another order round differently, and where two tokens are about as likely that decides between them; from
//! there on the texts differ. So for every request that parts, the model is asked how near the two tokens were.

use anyhow::Result;
use gemma_cuda::Gemma;
use gemma_cuda::generate::MAX_LOGPROBS;
use serde::Serialize;

use super::workload::{Workload, greedy, prompt};

/// How the tokens of two configurations compare.
#[derive(Serialize)]
pub struct Agreement {
    pub equal_requests: usize,
    /// Where the others part: the largest difference between the log-probabilities of the two tokens, as the model sees
    /// them. Little means that rounding decided between equals.
    pub widest_near_tie: Option<f32>,
}

/// `model` computed `own`, `first` another one; both request by request.
pub fn compare(model: &Gemma, workload: Workload, first: &[Vec<u32>], own: &[Vec<u32>]) -> Result<Agreement> {
    let mut agreement = Agreement { equal_requests: 0, widest_near_tie: None };
    for (i, ((a, b), lengths)) in first.iter().zip(own).zip(workload.requests(usize::MAX)).enumerate() {
        let Some(at) = a.iter().zip(b).position(|(a, b)| a != b) else {
            agreement.equal_requests += 1;
            continue;
        };
        let mut tokens = prompt(i, lengths.prompt, model.spec().vocab_size);
        tokens.extend(&a[..at]);
        let gap = gap(model, tokens, [a[at], b[at]])?;
        agreement.widest_near_tie = Some(agreement.widest_near_tie.map_or(gap, |widest| widest.max(gap)));
    }
    Ok(agreement)
}

/// Between two tokens that could follow; at least that much where one is far from the likeliest.
fn gap(model: &Gemma, tokens: Vec<u32>, [a, b]: [u32; 2]) -> Result<f32> {
    let completion = model.generate(greedy(tokens, 1).logprobs(MAX_LOGPROBS))?.finish()?;
    let likeliest = completion.logprobs.unwrap_or_default().into_iter().next().map_or(Vec::new(), |token| token.top);
    let last = likeliest.last().map_or(0.0, |token| token.logprob);
    let logprob = |id| likeliest.iter().find(|token| token.id == id).map_or(last, |token| token.logprob);
    Ok((logprob(a) - logprob(b)).abs())
}

#[cfg(test)]
mod tests {
    use super::super::measure::{Plan, measure};
    use super::*;
    use gemma_cuda::LoadOptions;

    #[test]
    fn tokens_that_part_are_weighed_where_they_do() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/tiny/gemma2-gqa");
        let options = LoadOptions { device: "reference".into(), max_sequences: 64, ..Default::default() };
        let model = Gemma::load(dir, options).unwrap();
        let plan = Plan { most_new: 4, repeat: 1, batches_of: None };
        let own = measure(&model, Workload::Tutorial, plan, 1e9).unwrap().tokens;
        let agreement = compare(&model, Workload::Tutorial, &own, &own).unwrap();
        assert_eq!((agreement.equal_requests, agreement.widest_near_tie), (64, None));

        let length = Workload::Tutorial.requests(4)[9].prompt;
        let before = [&prompt(9, length, model.spec().vocab_size)[..], &own[9][..2]].concat();
        let completion = model.generate(greedy(before, 1).logprobs(2)).unwrap().finish().unwrap();
        let [likeliest, next] = completion.logprobs.unwrap()[0].top[..] else { panic!("two were asked for") };
        let mut other = own.clone();
        other[9][2] = next.id;
        other[9][3] = 0;
        let agreement = compare(&model, Workload::Tutorial, &other, &own).unwrap();
        assert_eq!(agreement.equal_requests, 63);
        let gap = agreement.widest_near_tie.unwrap();
        assert!((gap - (likeliest.logprob - next.logprob)).abs() < 0.02, "{gap} {likeliest:?} {next:?}");
    }
}
