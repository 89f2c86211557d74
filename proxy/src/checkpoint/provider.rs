//! One agent while a sequence runs: a task that answers the newest request and drops any other.

use super::agent::{Answer, Request, Trouble};
use super::exec::Exec;
use super::qga::Qga;
use super::sequence::{Ask, Input};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};

/// A way to an agent.
#[derive(Debug)]
pub enum Provider {
    /// QEMU's guest agent.
    Qga(Qga),
    /// Two commands.
    Exec(Box<Exec>),
}

/// To the agent's task.
#[derive(Debug, Clone, Copy)]
pub(super) enum Order {
    Ask(Ask, Request),
    Cancel,
}

impl Provider {
    /// One exchange; `sent` is called when the request has left.
    ///
    /// # Errors
    /// No answer that could be used.
    pub async fn ask(&mut self, request: Request, sent: impl FnOnce()) -> Result<Answer, Trouble> {
        match self {
            Self::Qga(qga) => qga.ask(request, sent).await,
            Self::Exec(exec) => exec.ask(request, sent).await,
        }
    }

    /// Works until its orders end. An order replaces the one before it.
    pub(super) async fn work(
        mut self,
        agent: usize,
        mut orders: UnboundedReceiver<Order>,
        inputs: UnboundedSender<Input>,
    ) {
        let mut next = orders.recv().await;
        while let Some(order) = next {
            let Order::Ask(ask, request) = order else {
                next = orders.recv().await;
                continue;
            };
            let sent = || {
                inputs.send(Input::Sent { agent, ask }).ok();
            };
            next = tokio::select! {
                biased;
                replaced = orders.recv() => replaced,
                result = self.ask(request, sent) => {
                    inputs.send(Input::Answered { agent, ask, result }).ok();
                    orders.recv().await
                }
            };
        }
    }
}
