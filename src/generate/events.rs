//! The way from the worker to a generation's reader, who blocks or, with the feature `futures`, is polled.

use std::sync::mpsc::{Receiver, RecvError, Sender, channel};

#[cfg(feature = "futures")]
use {
    atomic_waker::AtomicWaker,
    std::sync::Arc,
    std::sync::mpsc::TryRecvError,
    std::task::{Context, Poll},
};

use super::job::Event;

pub(crate) struct EventSender {
    /// `None` only while it is dropped.
    events: Option<Sender<Event>>,
    #[cfg(feature = "futures")]
    reader: Arc<AtomicWaker>,
}

pub(crate) struct EventReceiver {
    events: Receiver<Event>,
    #[cfg(feature = "futures")]
    reader: Arc<AtomicWaker>,
}

pub(crate) fn events() -> (EventSender, EventReceiver) {
    let (sender, receiver) = channel();
    #[cfg(feature = "futures")]
    let reader = Arc::new(AtomicWaker::new());
    (
        EventSender {
            events: Some(sender),
            #[cfg(feature = "futures")]
            reader: reader.clone(),
        },
        EventReceiver {
            events: receiver,
            #[cfg(feature = "futures")]
            reader,
        },
    )
}

impl EventSender {
    /// A reader that no longer listens has dropped its generation, which also cancelled the job.
    pub fn send(&self, event: Event) {
        let _gone = self.events.as_ref().map(|events| events.send(event));
        self.wake();
    }

    fn wake(&self) {
        #[cfg(feature = "futures")]
        self.reader.wake();
    }
}

impl Drop for EventSender {
    fn drop(&mut self) {
        self.events = None; // before the reader looks
        self.wake();
    }
}

impl EventReceiver {
    pub fn recv(&self) -> Result<Event, RecvError> {
        self.events.recv()
    }

    #[cfg(test)]
    pub fn try_recv(&self) -> Option<Event> {
        self.events.try_recv().ok()
    }

    #[cfg(feature = "futures")]
    pub fn poll(&self, context: &Context<'_>) -> Poll<Result<Event, RecvError>> {
        self.reader.register(context.waker()); // before looking: what comes in between wakes
        match self.events.try_recv() {
            Ok(event) => Poll::Ready(Ok(event)),
            Err(TryRecvError::Empty) => Poll::Pending,
            Err(TryRecvError::Disconnected) => Poll::Ready(Err(RecvError)),
        }
    }
}
