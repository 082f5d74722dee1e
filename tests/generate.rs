//! The generation API over the real engine, on tiny models with random weights.

mod support;

use std::time::{Duration, Instant};

use gemma_cuda::checkpoint::Message;
use gemma_cuda::eval::perplexity_of_tokens;
use gemma_cuda::{
    Completion, ComputeType, Error, FinishReason, Gemma, Generation, KvCache, LoadOptions, Piece, Prompt, Request,
    SamplingParams, Usage,
};

const EOS: u32 = 1;

fn options() -> LoadOptions {
    LoadOptions { device: "reference".into(), compute: ComputeType::F32, threads: 2, ..Default::default() }
}

fn load(options: LoadOptions) -> Gemma {
    Gemma::load(support::golden_dir(support::MODEL), options).unwrap()
}

fn complete(model: &Gemma, request: Request) -> Completion {
    model.generate(request).and_then(Generation::finish).unwrap()
}

/// A small generator, so that the tests draw the same numbers every time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % end
    }

    fn tokens(&mut self, count: u64) -> Vec<u32> {
        (0..count).map(|_| 3 + self.below(500) as u32).collect()
    }
}

fn seeded(prompt: &[u32]) -> Request {
    Request::new(prompt.to_vec())
        .sampling(SamplingParams {
            temperature: Some(1.3),
            top_k: Some(50),
            top_p: Some(0.9),
            min_p: Some(0.01),
            repetition_penalty: Some(1.2),
            presence_penalty: Some(0.3),
            frequency_penalty: Some(0.2),
            seed: Some(12345),
            logit_bias: vec![(7, 0.5)],
        })
        .max_new_tokens(30)
        .ignore_eos(true)
        .logprobs(3)
        .prompt_logprobs(2)
}

fn without_timing(completion: Completion) -> Completion {
    Completion { timing: Default::default(), cached_prompt_tokens: 0, ..completion }
}

#[test]
fn a_generation_does_not_depend_on_what_else_runs() {
    let mut numbers = Numbers(1);
    let prompt = numbers.tokens(21);
    let alone = without_timing(complete(&load(options()), seeded(&prompt)));
    assert_eq!(alone.token_ids.len(), 30);
    assert_eq!(alone.logprobs.as_ref().map(Vec::len), Some(30));
    assert!(alone.logprobs.iter().flatten().all(|token| token.top.len() == 3));
    assert_eq!(alone.prompt_logprobs.as_ref().map(Vec::len), Some(20));
    assert_eq!(alone.seed, Some(12345));

    // In a crowd that fights for few pages and a small step, so that everyone is cut in chunks and gives way.
    let crowded = LoadOptions {
        kv_cache: KvCache::Tokens(160),
        page_size: 4,
        max_batch_tokens: 9,
        max_sequences: 6,
        ..options()
    };
    let model = load(crowded);
    let others: Vec<Generation> = (0..12)
        .map(|_| {
            let (length, new) = (1 + numbers.below(40), 1 + numbers.below(40) as usize);
            model.generate(Request::new(numbers.tokens(length)).max_new_tokens(new).ignore_eos(true)).unwrap()
        })
        .collect();
    let among_others = model.generate(seeded(&prompt)).unwrap();
    let second = model.generate(seeded(&prompt)).unwrap();
    let mut streamed = Vec::new();
    let mut among_others = among_others;
    for piece in &mut among_others {
        streamed.extend(piece.unwrap().tokens);
    }
    assert_eq!(Some(&streamed), alone.logprobs.as_ref());
    assert_eq!(without_timing(among_others.finish().unwrap()), alone);
    assert_eq!(without_timing(second.finish().unwrap()), alone);
    for other in others {
        other.finish().unwrap();
    }
}

/// Greedy and sampled, with prompts longer than a step's share, ends at different times and requests that wait.
#[test]
fn a_padded_batch_gives_the_same_tokens() {
    let requests = || {
        let mut numbers = Numbers(3);
        let request = move |i: u64| {
            let (length, new) = (1 + numbers.below(40), 1 + numbers.below(40) as usize);
            let request = Request::new(numbers.tokens(length)).max_new_tokens(new).ignore_eos(true);
            let sampled = SamplingParams { temperature: Some(1.0), seed: Some(i), ..Default::default() };
            if i.is_multiple_of(3) { request.sampling(sampled) } else { request.sampling(SamplingParams::greedy()) }
        };
        (0..14).map(request).collect::<Vec<_>>()
    };
    let tokens = |padded| {
        let model = load(LoadOptions { padded, max_sequences: 5, max_batch_tokens: 39, ..options() });
        let running = model.generate_all(requests()).unwrap();
        let tokens: Vec<_> = running.into_iter().map(|generation| generation.finish().unwrap().token_ids).collect();
        (tokens, model.statistics().unwrap())
    };
    let ((ragged, few), (padded, many)) = (tokens(false), tokens(true));
    assert_eq!(padded, ragged);
    assert_eq!(many.tokens, few.tokens);
    assert!(many.steps > few.steps, "{many:?} {few:?}"); // shares of 7 tokens
}

#[test]
fn requests_that_start_together_are_refused_together() {
    let model = load(options());
    let good = || Request::new(vec![2, 9]).max_new_tokens(3);
    let error = model.generate_all([good(), Request::new(vec![512])]).err().unwrap();
    assert!(error.to_string().contains("512"), "{error}");
    assert_eq!(model.statistics().unwrap().steps, 0);
    assert_eq!(model.generate_all([]).unwrap().len(), 0);
    assert_eq!(model.generate_all([good(), good()]).unwrap().len(), 2);
}

#[test]
fn a_drawn_seed_repeats_the_generation() {
    let model = load(options());
    let sampled = SamplingParams { temperature: Some(1.0), ..Default::default() };
    let request = Request::new(vec![2, 9]).max_new_tokens(20).ignore_eos(true);
    let first = complete(&model, request.clone().sampling(sampled.clone()));
    let again = SamplingParams { seed: first.seed, ..sampled };
    assert!(again.seed.is_some());
    assert_eq!(complete(&model, request.clone().sampling(again)).token_ids, first.token_ids);
    assert_eq!(complete(&model, request.sampling(SamplingParams::greedy())).seed, None);
}

/// 500 requests through a cache of 24 pages, a third of them cancelled at some time: all end, none starves, and every
/// page comes back.
#[test]
fn many_requests_share_few_pages() {
    let model = load(LoadOptions {
        kv_cache: KvCache::Tokens(24 * 8),
        page_size: 8,
        max_batch_tokens: 24,
        max_sequences: 8,
        ..options()
    });
    let mut numbers = Numbers(7);
    let start = Instant::now();
    let mut generations: Vec<(Generation, usize)> = Vec::new();
    for index in 0..500 {
        let (length, new) = (1 + numbers.below(60), 1 + numbers.below(40) as usize);
        let request = Request::new(numbers.tokens(length)).max_new_tokens(new).ignore_eos(true);
        generations.push((model.generate(request).unwrap(), new));
        if index % 3 == 0 {
            let victim = numbers.below(generations.len() as u64) as usize;
            generations[victim].0.cancel();
        }
        if index % 50 == 49 {
            std::thread::sleep(Duration::from_millis(5)); // cancel some in the middle of their run
        }
    }
    drop(generations.swap_remove(123)); // nobody waits for this one
    for (generation, new) in generations {
        let completion = generation.finish().unwrap();
        match completion.finish_reason {
            FinishReason::Cancelled => assert!(completion.token_ids.len() < new),
            reason => assert_eq!((reason, completion.token_ids.len()), (FinishReason::Length, new)),
        }
    }
    assert!(start.elapsed() < Duration::from_secs(120));
    while model.usage().unwrap().running > 0 {}
    assert_eq!(model.usage().unwrap(), Usage { running: 0, waiting: 0, free_pages: 24, pages: 24 });
}

#[test]
fn a_conversation_is_continued_from_the_cache() {
    let turn = |model: &Gemma, prompt: &[u32]| complete(model, Request::new(prompt.to_vec()).max_new_tokens(20));
    let mut prompt = Numbers(3).tokens(20);
    let model = load(LoadOptions { page_size: 4, ..options() });
    let first = turn(&model, &prompt);
    assert_eq!(first.cached_prompt_tokens, 0);
    prompt.extend(&first.token_ids);
    prompt.extend([5, 6, 7]);
    let second = turn(&model, &prompt);
    let whole_pages = (20 + first.token_ids.len() - 1) / 4 * 4;
    assert_eq!(second.cached_prompt_tokens, whole_pages);
    let fresh = load(LoadOptions { prefix_cache: false, ..options() });
    assert_eq!(turn(&fresh, &prompt).token_ids, second.token_ids);
}

#[test]
fn lengths_stop_tokens_and_minimum() {
    let model = load(options());
    let request = || Request::new(vec![2, 17, 4]).ignore_eos(true);
    let free = complete(&model, request().max_new_tokens(12));
    assert_eq!((free.finish_reason, free.token_ids.len()), (FinishReason::Length, 12));
    let stop = free.token_ids[5];
    let first = free.token_ids.iter().position(|&token| token == stop).unwrap();

    let stopped = complete(&model, request().max_new_tokens(12).stop_tokens([stop]));
    assert_eq!(stopped.finish_reason, FinishReason::Stop);
    assert_eq!(stopped.token_ids, free.token_ids[..=first]);

    let longer = complete(&model, request().max_new_tokens(12).stop_tokens([stop]).min_new_tokens(first + 3));
    assert!(longer.token_ids.len() > first + 3 || longer.finish_reason == FinishReason::Length);
    assert!(!longer.token_ids[..first + 3].contains(&stop));

    // A bias makes the checkpoint's own end token the likeliest.
    let ending = SamplingParams { logit_bias: vec![(EOS, 1000.0)], ..SamplingParams::greedy() };
    let ended = complete(&model, Request::new(vec![2, 17, 4]).sampling(ending.clone()).max_new_tokens(12));
    assert_eq!((ended.finish_reason, ended.token_ids), (FinishReason::Stop, vec![EOS]));
    let ignored = complete(&model, request().sampling(ending).max_new_tokens(12));
    assert_eq!(ignored.token_ids, [EOS; 12]);
}

#[test]
fn without_a_maximum_as_many_tokens_as_fit() {
    let model = load(options());
    let completion = complete(&model, Request::new(vec![5; 100]).ignore_eos(true));
    assert_eq!(completion.token_ids.len(), 28); // the context is 128
}

#[test]
fn cancelling_keeps_what_there_is() {
    let model = load(options());
    let mut generation = model.generate(Request::new(vec![2]).max_new_tokens(127).ignore_eos(true)).unwrap();
    let canceller = generation.canceller();
    let first: Piece = generation.next().unwrap().unwrap();
    canceller.cancel();
    let completion = generation.finish().unwrap();
    // On a fast machine it may have run to its end before the cancellation came.
    let ended = completion.token_ids.len() == 127;
    assert_eq!(completion.finish_reason, if ended { FinishReason::Length } else { FinishReason::Cancelled });
    assert_eq!(completion.token_ids[0], first.tokens[0].id);
}

#[test]
fn dropping_the_model_ends_its_generations() {
    let model = load(options());
    let clone = model.clone();
    let waiting: Vec<Generation> =
        (0..200).map(|_| model.generate(Request::new(vec![2]).max_new_tokens(120).ignore_eos(true)).unwrap()).collect();
    drop(model);
    drop(clone);
    let reasons: Vec<FinishReason> = waiting.into_iter().map(|g| g.finish().unwrap().finish_reason).collect();
    assert_eq!(reasons.last(), Some(&FinishReason::Cancelled));
}

#[test]
fn scores_are_those_of_a_greedy_generation() {
    let model = load(LoadOptions { max_batch_tokens: 32, ..options() });
    let request = Request::new(vec![2, 17, 4]).max_new_tokens(40).ignore_eos(true).logprobs(0);
    let completion = complete(&model, request.sampling(SamplingParams::greedy()));
    let whole: Vec<u32> = completion.prompt_token_ids.iter().chain(&completion.token_ids).copied().collect();
    let scores = model.score(&whole).unwrap();
    assert_eq!(scores.len(), whole.len() - 1);
    assert_eq!(&scores[2..], completion.logprobs.as_deref().unwrap());
    assert_eq!(model.score(&[2]).unwrap(), []);
}

#[test]
fn what_cannot_be_is_refused_at_once_and_by_name() {
    let model = load(LoadOptions { kv_cache: KvCache::Tokens(96), ..options() });
    let refuse = |request: Request| model.generate(request).err().expect("a refusal");
    let tokens = |count| Request::new(vec![5; count]);

    let error = refuse(tokens(130));
    assert!(matches!(&error, Error::TooLong(m) if m.contains("130") && m.contains("128")), "{error}");
    let error = refuse(tokens(60).max_new_tokens(60));
    assert!(matches!(&error, Error::TooLong(m) if m.contains("96 tokens (3 pages of 32)")), "{error}");
    let error = refuse(tokens(60).max_new_tokens(usize::MAX));
    assert!(matches!(&error, Error::TooLong(_)), "{error}");
    let error = refuse(Request::new(vec![2, 512]));
    assert!(matches!(&error, Error::InvalidArgument(m) if m.contains("512") && m.contains("511")), "{error}");
    let error = refuse(tokens(1).stop_tokens([9999]));
    assert!(matches!(&error, Error::InvalidArgument(m) if m.contains("9999")), "{error}");
    let error = refuse(tokens(1).max_new_tokens(0));
    assert!(matches!(&error, Error::InvalidArgument(m) if m.contains("max_new_tokens")), "{error}");
    let error = refuse(tokens(1).sampling(SamplingParams { top_p: Some(-1.0), ..Default::default() }));
    assert!(matches!(&error, Error::InvalidArgument(m) if m.contains("top_p is -1")), "{error}");
    for needs_tokenizer in [Request::new("text"), tokens(1).stop(["\n"])] {
        let error = refuse(needs_tokenizer);
        assert!(matches!(&error, Error::Tokenizer(m) if m.contains("tokenizer.json")), "{error}");
    }
    assert!(model.tokenize(&Prompt::Text("text".into())).is_err());
    assert!(matches!(model.score(&[]), Err(Error::InvalidArgument(_))));
    assert!(matches!(model.score(&[5; 97]), Err(Error::TooLong(_))));
    // And nothing of it disturbs the model.
    assert_eq!(complete(&model, tokens(3).max_new_tokens(2).ignore_eos(true)).token_ids.len(), 2);
}

#[test]
fn options_that_cannot_be_are_refused_by_name() {
    let refuse = |options: LoadOptions| {
        Gemma::load(support::golden_dir(support::MODEL), options).expect_err("a refusal").to_string()
    };
    assert!(refuse(LoadOptions { device: "tpu".into(), ..options() }).contains("tpu"));
    assert!(refuse(LoadOptions { device: "cuda:99".into(), ..options() }).contains("cuda:99"));
    assert!(refuse(LoadOptions { max_sequences: 0, ..options() }).contains("max_sequences is 0"));
    assert!(refuse(LoadOptions { kv_cache: KvCache::Bytes(10), ..options() }).contains("holds no page"));
    let huge = refuse(LoadOptions { kv_cache: KvCache::Tokens(1 << 28), ..options() });
    assert!(huge.contains("are free"), "{huge}");
}

#[test]
fn pieces_make_up_the_text_and_a_stop_string_ends_it() {
    let dir = support::model_with_text();
    let model = Gemma::load(dir.path(), options()).unwrap();
    for seed in 0..20 {
        let sampling = SamplingParams { temperature: Some(2.0), seed: Some(seed), ..Default::default() };
        let request = Request::new("hé").sampling(sampling).max_new_tokens(60).ignore_eos(true);
        let mut generation = model.generate(request.clone()).unwrap();
        let streamed: String = generation.by_ref().map(|piece| piece.unwrap().text).collect();
        let free = generation.finish().unwrap();
        assert_eq!(free.prompt_token_ids, [2, 3 + u32::from(b'h'), 3 + 0xc3, 3 + 0xa9]);
        assert_eq!(streamed, free.text);
        assert!(free.text.chars().count() > 10);

        let characters: Vec<char> = free.text.chars().collect();
        let stop: String = characters[8..10].iter().collect();
        let before = free.text.find(&stop).unwrap();
        let stopped = complete(&model, request.clone().stop([stop.clone(), "never".into()]));
        assert_eq!(stopped.finish_reason, FinishReason::StopString);
        assert_eq!(stopped.text, free.text[..before]);
        assert!(free.token_ids.starts_with(&stopped.token_ids));

        // Only what comes after the minimum is searched.
        let later = complete(&model, request.stop([stop]).min_new_tokens(59));
        assert!(later.token_ids.len() >= 59);
    }
}

#[test]
fn a_conversation_goes_through_the_chat_template() {
    let dir = support::model_with_text();
    let model = Gemma::load(dir.path(), options()).unwrap();
    let chat = model.tokenize(&Prompt::Chat(vec![Message::user("hi")])).unwrap();
    let text = model.tokenize(&Prompt::Text("u:hi;m:".into())).unwrap();
    assert_eq!(chat, text, "one beginning-of-sequence token, then the rendered text");
    let error = Gemma::load(support::golden_dir(support::MODEL), options()).unwrap();
    let error = error.tokenize(&Prompt::Chat(vec![Message::user("hi")])).unwrap_err();
    assert!(error.to_string().contains("chat template"), "{error}");
}

#[test]
fn perplexity_is_that_of_the_windows() {
    let model = load(options());
    let tokens = Numbers(5).tokens(50);
    let result = perplexity_of_tokens(&model, 2, &tokens, Some(16), |_, _| {}).unwrap();
    let mut nll = 0.0;
    for window in tokens.chunks(15) {
        let sequence = [&[2], window].concat();
        nll -= model.score(&sequence).unwrap().iter().map(|token| f64::from(token.logprob)).sum::<f64>();
    }
    assert_eq!((result.tokens, result.windows, result.window), (50, 4, 16));
    assert!((result.nll - nll).abs() < 1e-9);
    assert!((result.perplexity - (nll / 50.0).exp()).abs() < 1e-9 * result.perplexity);
    assert!(perplexity_of_tokens(&model, 2, &tokens, Some(1), |_, _| {}).is_err());
    assert!(perplexity_of_tokens(&model, 2, &[], None, |_, _| {}).is_err());
}
