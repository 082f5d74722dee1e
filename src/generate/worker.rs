//! The thread that owns the engine, and the way requests get there.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use super::events::events;
use super::generation::Generation;
use super::job::{Job, Plan};
use super::scheduler::{Core, Scheduler, Usage};
use crate::engine::EngineStatistics;
use crate::{Error, Result};

enum Command {
    Run(Vec<Job>),
    Report(Sender<Usage>),
    Statistics(Sender<EngineStatistics>),
    CopyBandwidth(Sender<Result<f64>>),
}

/// Why the thread ended; set by it however it ends.
pub(crate) type Ending = Arc<OnceLock<String>>;

/// Dropping it ends every request as cancelled and joins the thread.
pub(crate) struct Worker {
    /// `None` only while it is dropped.
    commands: Option<Sender<Command>>,
    thread: Option<JoinHandle<()>>,
    ending: Ending,
}

impl Worker {
    pub fn spawn<E: Core + Send + 'static>(scheduler: Scheduler<E>) -> Result<Self> {
        let (commands, inbox) = channel();
        let ending = Ending::default();
        let reason = ending.clone();
        let thread = std::thread::Builder::new()
            .name("gemma-cuda".into())
            .spawn(move || work(scheduler, &inbox, &reason))
            .map_err(|error| Error::Engine(format!("cannot start the worker thread: {error}")))?;
        Ok(Worker { commands: Some(commands), thread: Some(thread), ending })
    }

    pub fn submit(&self, plan: Plan) -> Result<Generation> {
        let (job, generation) = self.job(plan);
        self.send(Command::Run(vec![job]))?;
        Ok(generation)
    }

    /// All enter the queue between the same two steps.
    pub fn submit_all(&self, plans: Vec<Plan>) -> Result<Vec<Generation>> {
        let (jobs, generations) = plans.into_iter().map(|plan| self.job(plan)).unzip();
        self.send(Command::Run(jobs))?;
        Ok(generations)
    }

    fn job(&self, plan: Plan) -> (Job, Generation) {
        let (events, inbox) = events();
        let generation = Generation::new(inbox, self.ending.clone());
        (Job::new(plan, events, generation.cancel_flag()), generation)
    }

    pub fn usage(&self) -> Result<Usage> {
        self.ask(Command::Report)
    }

    pub fn statistics(&self) -> Result<EngineStatistics> {
        self.ask(Command::Statistics)
    }

    pub fn copy_bandwidth(&self) -> Result<f64> {
        self.ask(Command::CopyBandwidth)?
    }

    fn ask<T>(&self, question: impl FnOnce(Sender<T>) -> Command) -> Result<T> {
        let (reply, inbox) = channel();
        self.send(question(reply))?;
        inbox.recv().map_err(|_| gone(&self.ending))
    }

    fn send(&self, command: Command) -> Result<()> {
        let sent = self.commands.as_ref().map(|commands| commands.send(command));
        if let Some(Ok(())) = sent { Ok(()) } else { Err(gone(&self.ending)) }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            // The thread catches its own panics and has told every caller.
            let _caught = thread.join();
        }
    }
}

/// The error of a caller whose channel is closed. While a panic unwinds, that comes before the thread can say why.
pub(crate) fn gone(ending: &Ending) -> Error {
    Error::Engine(ending.wait().clone())
}

fn work<E: Core>(mut scheduler: Scheduler<E>, inbox: &Receiver<Command>, ending: &Ending) {
    let end = match catch_unwind(AssertUnwindSafe(|| serve(&mut scheduler, inbox))) {
        Ok(Ok(())) => {
            ending.get_or_init(|| "the model was dropped".into());
            return;
        }
        Ok(Err(error)) => error,
        Err(panic) => Error::Engine(format!("the worker panicked: {}", panic_message(&*panic))),
    };
    tracing::error!(error = %end, "the worker stops");
    let message = if let Error::Engine(message) = &end { message.clone() } else { end.to_string() };
    ending.get_or_init(|| message);
    scheduler.abandon_all(&end);
}

/// Returns when the last handle is gone.
fn serve<E: Core>(scheduler: &mut Scheduler<E>, inbox: &Receiver<Command>) -> Result<()> {
    loop {
        let command =
            if scheduler.is_idle() { inbox.recv().map_err(|_| TryRecvError::Disconnected) } else { inbox.try_recv() };
        match command {
            Ok(Command::Run(jobs)) => jobs.into_iter().for_each(|job| scheduler.submit(job)),
            Ok(Command::Report(reply)) => answer(&reply, scheduler.usage()),
            Ok(Command::Statistics(reply)) => answer(&reply, scheduler.engine().statistics()),
            Ok(Command::CopyBandwidth(reply)) => answer(&reply, scheduler.engine().copy_bandwidth()),
            Err(TryRecvError::Empty) => scheduler.tick()?,
            Err(TryRecvError::Disconnected) => return scheduler.cancel_all(),
        }
    }
}

fn answer<T>(reply: &Sender<T>, value: T) {
    let _gone = reply.send(value); // nobody waits any more
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::super::fake::{FakeEngine, Fault};
    use super::super::scheduler::Limits;
    use super::super::text::TextStream;
    use super::*;
    use crate::checkpoint::GenerationConfig;
    use crate::{FinishReason, SamplingParams};

    const LIMITS: Limits =
        Limits { page_size: 4, pages: 4096, max_batch_tokens: 8, max_chunk: 8, max_sequences: 4, max_logit_rows: 4 };

    fn plan(max_new_tokens: usize) -> Plan {
        Plan {
            prompt: vec![1, 2, 3],
            max_new_tokens,
            stop_tokens: Vec::new(),
            sampling: SamplingParams::greedy().resolve(&GenerationConfig::default(), 100).unwrap(),
            logprobs: None,
            prompt_logprobs: None,
            text: TextStream::new(None, Vec::new(), 0),
        }
    }

    fn worker(faults: impl IntoIterator<Item = (usize, Fault)>) -> Worker {
        let mut engine = FakeEngine::new(LIMITS);
        engine.faults.extend(faults);
        Worker::spawn(Scheduler::new(engine, LIMITS)).unwrap()
    }

    #[test]
    fn a_panic_reaches_every_caller_with_its_message() {
        let worker = worker([(5, Fault::Panic)]);
        let running: Vec<_> = (0..8).filter_map(|_| worker.submit(plan(1000)).ok()).collect();
        for generation in running {
            let error = generation.finish().unwrap_err();
            assert!(matches!(&error, Error::Engine(m) if m.contains("a bug in the engine")), "{error}");
        }
        let later = loop {
            // The thread may still be on its way out.
            if let Err(error) = worker.submit(plan(1)).and_then(Generation::finish) {
                break error;
            }
        };
        assert!(later.to_string().contains("a bug in the engine"), "{later}");
        assert!(worker.usage().is_err());
    }

    #[test]
    fn a_panic_in_the_middle_of_an_end_reaches_its_caller_too() {
        let mut engine = FakeEngine::new(LIMITS);
        engine.panics_on_remove = true;
        let worker = Worker::spawn(Scheduler::new(engine, LIMITS)).unwrap();
        let error = worker.submit(plan(3)).and_then(Generation::finish).unwrap_err();
        assert!(error.to_string().contains("a bug in remove_sequence"), "{error}");
    }

    #[test]
    fn an_error_is_the_last_item_and_the_result() {
        let worker = worker([(1, Fault::Error(Error::Device("no power".into())))]);
        let mut generation = worker.submit(plan(10)).unwrap();
        assert!(generation.next().unwrap().is_ok());
        assert!(matches!(generation.next(), Some(Err(Error::Device(_)))));
        assert!(generation.next().is_none());
        assert!(matches!(generation.finish(), Err(Error::Device(_))));
        assert_eq!(worker.submit(plan(3)).unwrap().finish().unwrap().token_ids.len(), 3);
    }

    #[test]
    fn questions_to_the_engine_are_answered_between_steps() {
        let worker = worker([]);
        assert_eq!(worker.submit(plan(3)).unwrap().finish().unwrap().token_ids.len(), 3);
        let statistics = worker.statistics().unwrap();
        assert!(statistics.steps >= 3 && statistics.tokens >= statistics.steps, "{statistics:?}");
        assert!(
            matches!(worker.copy_bandwidth(), Err(Error::Device(message)) if message.contains("no memory to copy"))
        );
        assert_eq!(worker.submit(plan(3)).unwrap().finish().unwrap().token_ids.len(), 3);
    }

    #[test]
    fn dropping_the_worker_ends_what_runs_as_cancelled() {
        let worker = worker([]);
        let mut generation = worker.submit(plan(10_000)).unwrap();
        generation.next().unwrap().unwrap();
        drop(worker);
        assert_eq!(generation.finish().unwrap().finish_reason, FinishReason::Cancelled);
    }

    #[test]
    fn dropping_a_generation_frees_its_pages() {
        let worker = worker([]);
        drop(worker.submit(plan(10_000)).unwrap());
        while worker.usage().unwrap().running + worker.usage().unwrap().waiting > 0 {
            std::thread::yield_now();
        }
        assert_eq!(worker.usage().unwrap().free_pages, LIMITS.pages);
    }
}
