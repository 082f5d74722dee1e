use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use super::super::completion::Completion;
use super::super::events::{EventReceiver, events};
use super::super::fake::{FakeEngine, Fault, successor};
use super::super::job::{Event, Plan};
use super::super::text::TextStream;
use super::*;
use crate::SamplingParams;
use crate::checkpoint::GenerationConfig;

const LIMITS: Limits =
    Limits { page_size: 4, pages: 16, max_batch_tokens: 8, max_chunk: 8, max_sequences: 4, max_logit_rows: 4 };

fn plan(prompt: &[u32], max_new_tokens: usize) -> Plan {
    Plan {
        prompt: prompt.to_vec(),
        max_new_tokens,
        stop_tokens: Vec::new(),
        sampling: SamplingParams::greedy().resolve(&GenerationConfig::default(), 100).unwrap(),
        logprobs: None,
        prompt_logprobs: None,
        text: TextStream::new(None, Vec::new(), 0),
    }
}

/// A caller's end of a job.
struct Caller {
    events: EventReceiver,
    cancelled: Arc<AtomicBool>,
}

impl Caller {
    fn result(&self) -> Option<Result<Completion>> {
        std::iter::from_fn(|| self.events.try_recv()).find_map(|event| match event {
            Event::Piece(_) => None,
            Event::Done(completion) => Some(Ok(*completion)),
            Event::Failed(error) => Some(Err(error)),
        })
    }
}

fn submit(scheduler: &mut Scheduler<FakeEngine>, plan: Plan) -> Caller {
    let (events, inbox) = events();
    let cancelled = Arc::new(AtomicBool::new(false));
    scheduler.submit(Job::new(plan, events, cancelled.clone()));
    Caller { events: inbox, cancelled }
}

fn scheduler(limits: Limits) -> Scheduler<FakeEngine> {
    Scheduler::new(FakeEngine::new(limits), limits)
}

/// Runs to the end; far more ticks than any test needs mean that nobody moves on.
fn drain(scheduler: &mut Scheduler<FakeEngine>) {
    for _ in 0..100_000 {
        if scheduler.is_idle() {
            assert_eq!(scheduler.engine.free_pages(), scheduler.limits.pages, "pages were lost");
            return;
        }
        scheduler.tick().unwrap();
    }
    panic!("the scheduler makes no progress");
}

fn expected(prompt: &[u32], new_tokens: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..new_tokens {
        tokens.push(successor(&tokens));
    }
    tokens.split_off(prompt.len())
}

#[test]
fn a_long_prompt_is_computed_in_chunks_beside_the_decoding_of_others() {
    let mut scheduler = scheduler(LIMITS);
    let short = submit(&mut scheduler, plan(&[1, 2], 12));
    scheduler.tick().unwrap();
    let long = submit(&mut scheduler, plan(&[3; 30], 1));
    drain(&mut scheduler);
    let steps = &scheduler.engine.steps;
    for step in &steps[1..5] {
        assert_eq!(step.iter().map(|item| item.tokens).collect::<Vec<_>>()[..2], [1, 7]);
    }
    assert_eq!(short.result().unwrap().unwrap().token_ids, expected(&[1, 2], 12));
    assert_eq!(long.result().unwrap().unwrap().token_ids, expected(&[3; 30], 1));
}

#[test]
fn a_prompt_gets_its_share_of_the_tokens_beside_those_who_generate() {
    let limits = Limits { pages: 2000, max_batch_tokens: 1200, max_chunk: 1200, ..LIMITS };
    let mut scheduler = scheduler(limits);
    let first: Vec<_> = (1..=3).map(|id| submit(&mut scheduler, plan(&vec![id; 390], 20))).collect();
    scheduler.tick().unwrap();
    let late = submit(&mut scheduler, plan(&[9; 700], 1));
    drain(&mut scheduler);
    let tokens = |step: usize| scheduler.engine.steps[step].iter().map(|item| item.tokens).collect::<Vec<_>>();
    assert_eq!(tokens(0), [390, 390, 390]); // nobody generates: all of the budget
    assert_eq!(tokens(1), [1, 1, 1, 253]); // of 300 what makes a step of a round number of tokens
    assert_eq!(tokens(2), [1, 1, 1, 253]);
    assert_eq!(tokens(3), [1, 1, 1, 194]);
    assert_eq!(late.result().unwrap().unwrap().token_ids, expected(&[9; 700], 1));
    assert!(first.iter().all(|caller| caller.result().unwrap().is_ok()));
    assert_eq!(scheduler.tokens_for_prompts(63, 1), TOKENS_AT_ONCE - 63);
    assert!(scheduler.tokens_for_prompts(1000, 1) > 0);
}

#[test]
fn the_youngest_gives_way_and_the_oldest_goes_on() {
    // Two sequences that grow to 8 pages each do not fit 10 together.
    let mut scheduler = scheduler(Limits { pages: 10, ..LIMITS });
    let old = submit(&mut scheduler, plan(&[1, 2], 30));
    let young = submit(&mut scheduler, plan(&[3, 4], 30));
    while old.result().is_none() {
        scheduler.tick().unwrap();
        assert!(scheduler.engine.steps.last().unwrap().iter().any(|item| item.sequence == 1), "the oldest waited");
    }
    assert!(young.result().is_none());
    drain(&mut scheduler);
    let longest = scheduler.engine.steps.iter().flatten().map(|item| item.tokens).max().unwrap();
    assert!(longest > 2, "the youngest never had to compute its tokens again");
    let completion = young.result();
    assert!(completion.is_some_and(|c| c.unwrap().token_ids == expected(&[3, 4], 30)));
}

#[test]
fn prompt_scores_survive_giving_way() {
    let mut scheduler = scheduler(Limits { pages: 10, ..LIMITS });
    let _old = submit(&mut scheduler, plan(&[1, 2], 37));
    let prompt: Vec<u32> = (10..40).collect();
    let scored = submit(&mut scheduler, Plan { prompt_logprobs: Some(0), ..plan(&prompt, 5) });
    drain(&mut scheduler);
    let completion = scored.result().unwrap().unwrap();
    let ids: Vec<u32> = completion.prompt_logprobs.unwrap().iter().map(|token| token.id).collect();
    assert_eq!(ids, prompt[1..]);
    assert_eq!(completion.token_ids, expected(&prompt, 5));
}

#[test]
fn scoring_alone_generates_nothing() {
    let mut scheduler = scheduler(LIMITS);
    let prompt: Vec<u32> = (10..33).collect();
    let scored = submit(&mut scheduler, Plan { prompt_logprobs: Some(0), ..plan(&prompt, 0) });
    drain(&mut scheduler);
    let completion = scored.result().unwrap().unwrap();
    assert_eq!(completion.prompt_logprobs.unwrap().len(), prompt.len() - 1);
    assert!(completion.token_ids.is_empty());
}

#[test]
fn stop_tokens_end_a_generation_and_are_reported() {
    let mut scheduler = scheduler(LIMITS);
    let tokens = expected(&[5, 6], 10);
    let caller = submit(&mut scheduler, Plan { stop_tokens: vec![tokens[3]], ..plan(&[5, 6], 10) });
    drain(&mut scheduler);
    let completion = caller.result().unwrap().unwrap();
    assert_eq!(completion.finish_reason, FinishReason::Stop);
    let first = tokens.iter().position(|&token| token == tokens[3]).unwrap();
    assert_eq!(completion.token_ids, tokens[..=first]);
}

#[test]
fn a_failed_step_fails_its_requests_and_no_others() {
    let mut scheduler = scheduler(Limits { max_sequences: 1, max_logit_rows: 1, ..LIMITS });
    scheduler.engine.faults.insert(1, Fault::Error(Error::Device("the GPU is gone".into())));
    let hit = submit(&mut scheduler, plan(&[1], 5));
    let next = submit(&mut scheduler, plan(&[2], 5));
    drain(&mut scheduler);
    assert!(matches!(hit.result(), Some(Err(Error::Device(message))) if message == "the GPU is gone"));
    assert_eq!(next.result().unwrap().unwrap().token_ids, expected(&[2], 5));
}

#[test]
fn logits_that_are_not_finite_end_only_their_own_request() {
    for ahead in [false, true] {
        let mut scheduler = scheduler(LIMITS);
        scheduler.engine.ahead = ahead;
        scheduler.engine.damaged.insert(2, 3);
        let callers: Vec<_> = (1..=3).map(|first| submit(&mut scheduler, plan(&[first, 2], 9))).collect();
        drain(&mut scheduler);
        for (first, caller) in (1..=3).zip(&callers) {
            let result = caller.result().unwrap();
            if first == 2 {
                assert!(matches!(&result, Err(Error::Engine(why)) if why.contains("not finite")), "{result:?}");
            } else {
                assert_eq!(result.unwrap().token_ids, expected(&[first, 2], 9));
            }
        }
    }
}

#[test]
fn an_engine_that_runs_out_of_pages_in_a_step_costs_time_and_not_requests() {
    let mut scheduler = scheduler(LIMITS);
    scheduler.engine.faults.insert(2, Fault::Error(Error::OutOfPages("none left".into())));
    let callers = [submit(&mut scheduler, plan(&[1], 5)), submit(&mut scheduler, plan(&[2], 5))];
    drain(&mut scheduler);
    for (prompt, caller) in [1, 2].into_iter().zip(callers) {
        assert_eq!(caller.result().unwrap().unwrap().token_ids, expected(&[prompt], 5));
    }
}

#[test]
fn a_sequence_that_finds_no_pages_even_alone_fails_instead_of_waiting_for_ever() {
    let mut scheduler = scheduler(LIMITS);
    scheduler.engine.missing_pages = LIMITS.pages;
    let caller = submit(&mut scheduler, plan(&[1], 5));
    drain(&mut scheduler);
    assert!(matches!(caller.result(), Some(Err(Error::OutOfPages(_)))));
}

#[test]
fn cancelled_jobs_end_with_what_they_have_wherever_they_are() {
    let mut scheduler = scheduler(Limits { max_sequences: 1, ..LIMITS });
    let running = submit(&mut scheduler, plan(&[1], 50));
    let waiting = submit(&mut scheduler, plan(&[2], 50));
    for _ in 0..3 {
        scheduler.tick().unwrap();
    }
    running.cancelled.store(true, Ordering::Relaxed);
    waiting.cancelled.store(true, Ordering::Relaxed);
    scheduler.tick().unwrap();
    assert!(scheduler.is_idle());
    for (caller, tokens) in [(running, 3), (waiting, 0)] {
        let completion = caller.result().unwrap().unwrap();
        assert_eq!((completion.finish_reason, completion.token_ids.len()), (FinishReason::Cancelled, tokens));
    }
}

/// While a step is on its way the next one is launched, up to the last token that is wanted and no further.
#[test]
fn a_device_that_works_on_its_own_never_waits() {
    let mut scheduler = scheduler(LIMITS);
    scheduler.engine.ahead = true;
    let caller = submit(&mut scheduler, plan(&[1, 2, 3], 6));
    scheduler.tick().unwrap();
    assert!(caller.result().is_none() && scheduler.launched.len() == 1);
    scheduler.tick().unwrap();
    assert_eq!((scheduler.launched.len(), scheduler.running[0].pending), (1, 1));
    drain(&mut scheduler);
    assert_eq!(scheduler.engine.steps.len(), 6);
    assert_eq!(caller.result().unwrap().unwrap().token_ids, expected(&[1, 2, 3], 6));

    let stop = expected(&[1, 2, 3], 3)[2];
    let caller = submit(&mut scheduler, Plan { stop_tokens: vec![stop], ..plan(&[1, 2, 3], 6) });
    let (_, other) = (drain(&mut scheduler), submit(&mut scheduler, plan(&[4], 2)));
    assert_eq!(scheduler.engine.steps.len(), 6 + 4); // one too far
    assert_eq!(caller.result().unwrap().unwrap().token_ids, expected(&[1, 2, 3], 3));
    drain(&mut scheduler);
    assert_eq!(other.result().unwrap().unwrap().token_ids, expected(&[4], 2));
}

/// Penalties need every token: nothing is launched before the last one is known.
#[test]
fn a_job_with_penalties_is_not_run_ahead() {
    let mut scheduler = scheduler(LIMITS);
    scheduler.engine.ahead = true;
    let sampling = SamplingParams { repetition_penalty: Some(1.2), ..SamplingParams::greedy() };
    let sampling = sampling.resolve(&GenerationConfig::default(), 100).unwrap();
    let caller = submit(&mut scheduler, Plan { sampling, ..plan(&[1, 2, 3], 6) });
    for _ in 0..20 {
        scheduler.tick().unwrap();
        assert!(scheduler.running.iter().all(|running| running.pending <= 1) && scheduler.launched.len() <= 1);
    }
    assert_eq!(caller.result().unwrap().unwrap().token_ids, expected(&[1, 2, 3], 6));
}

proptest! {
    /// Whatever the mix, the limits and the cancellations: everyone ends, with its own tokens, and every page returns.
    /// The fake checks each step against the limits.
    #[test]
    fn everyone_finishes_with_the_tokens_it_would_have_alone(
        jobs in prop::collection::vec((1usize..30, 1usize..20, any::<bool>(), 0u32..60), 1..30),
        pages in 13usize..30,
        max_sequences in 1usize..6,
        spare_tokens in 0usize..10,
        max_chunk in 1usize..12,
        ahead in any::<bool>(),
    ) {
        let limits = Limits {
            pages, max_sequences, max_chunk, max_batch_tokens: max_sequences + spare_tokens,
            max_logit_rows: max_sequences,
            ..LIMITS
        };
        let mut scheduler = scheduler(limits);
        scheduler.engine.ahead = ahead;
        let mut callers = Vec::new();
        for (index, &(length, new_tokens, score, cancel_at)) in jobs.iter().enumerate() {
            let prompt: Vec<u32> = (0..length).map(|i| (index * 7 + i) as u32 % 90).collect();
            let prompt_logprobs = score.then_some(0);
            let caller = submit(&mut scheduler, Plan { prompt_logprobs, ..plan(&prompt, new_tokens) });
            callers.push((caller, prompt, new_tokens, score, cancel_at));
        }
        for tick in 0..60 {
            for (caller, .., cancel_at) in &callers {
                // Those who draw 40 or more are never cancelled.
                caller.cancelled.fetch_or(*cancel_at == tick && tick < 40, Ordering::Relaxed);
            }
            scheduler.tick().unwrap();
        }
        drain(&mut scheduler);
        for (caller, prompt, new_tokens, score, _) in callers {
            let completion = caller.result().expect("an end").expect("a completion");
            let whole = expected(&prompt, new_tokens);
            if completion.finish_reason == FinishReason::Cancelled {
                prop_assert!(whole.starts_with(&completion.token_ids));
            } else {
                prop_assert_eq!(completion.token_ids, whole);
                prop_assert_eq!(completion.prompt_logprobs.map(|p| p.len()), score.then_some(prompt.len() - 1));
            }
        }
    }
}
