//! Lines of QEMU's guest agent: bytes in, messages out.
//!
//! The agent speaks JSON, one value a line, and puts a 0xFF byte before the answer to
//! `guest-sync-delimited`: everything before that byte belongs to somebody's past.

use serde_json::Value;

/// Longest line; the list of file systems is the longest that is asked for.
const LINE_BYTES_MAX: usize = 4 << 20;
const SENTINEL: u8 = 0xFF;

/// One line.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// A sentinel stood before it.
    pub delimited: bool,
    /// The message, or what was there instead.
    pub message: Result<Message, String>,
}

/// An answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// As in the request, if the agent gives it back.
    pub id: Option<u64>,
    /// What it returns, or the text of its error.
    pub outcome: Result<Value, String>,
}

/// What was received and not read yet.
#[derive(Debug, Default)]
pub struct Wire {
    received: Vec<u8>,
    delimited: bool,
}

impl Wire {
    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Takes bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        for part in bytes.split_inclusive(|byte| *byte == SENTINEL) {
            if let Some((_, before)) = part.split_last().filter(|(last, _)| **last == SENTINEL) {
                // What was complete before it stays: it may be the end of an exchange.
                self.received.extend_from_slice(before);
                let complete = self.received.iter().rposition(|byte| *byte == b'\n');
                self.received.truncate(complete.map_or(0, |at| at + 1));
                self.received.push(SENTINEL);
            } else {
                self.received.extend_from_slice(part);
            }
        }
        if self.received.len() > LINE_BYTES_MAX && !self.received.contains(&b'\n') {
            self.received = b"too long\n".to_vec();
        }
    }

    /// The next complete line.
    pub fn next_line(&mut self) -> Option<Line> {
        loop {
            while self.received.first() == Some(&SENTINEL) {
                self.received.remove(0);
                self.delimited = true;
            }
            let end = self.received.iter().position(|byte| *byte == b'\n')?;
            let line: Vec<u8> = self.received.drain(..=end).collect();
            let line = line.trim_ascii();
            if line.is_empty() {
                continue;
            }
            return Some(Line {
                delimited: std::mem::take(&mut self.delimited),
                message: parse(line),
            });
        }
    }
}

fn parse(line: &[u8]) -> Result<Message, String> {
    let garbage = || {
        let shown: String = String::from_utf8_lossy(line).chars().take(80).collect();
        format!("{shown:?}")
    };
    let Ok(Value::Object(mut object)) = serde_json::from_slice(line) else {
        return Err(garbage());
    };
    let id = object.get("id").and_then(Value::as_u64);
    let outcome = match (object.remove("return"), object.get("error")) {
        (Some(value), None) => Ok(value),
        (None, Some(error)) => {
            let text = error.get("desc").and_then(Value::as_str);
            Err(text.unwrap_or("an error without a text").to_owned())
        }
        _ => return Err(garbage()),
    };
    Ok(Message { id, outcome })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(wire: &mut Wire) -> Vec<Line> {
        std::iter::from_fn(|| wire.next_line()).collect()
    }

    fn returned(id: Option<u64>, value: impl Into<Value>) -> Result<Message, String> {
        let outcome = Ok(value.into());
        Ok(Message { id, outcome })
    }

    #[test]
    fn lines_come_out_whole_however_they_went_in() {
        let stream =
            b"{\"return\": 1, \"id\": 5}\n\n\xff{\"return\": 2}\r\n{\"error\": {\"desc\": \"no\"}}\n{\"re";
        let mut all = Wire::default();
        all.push(stream);
        let mut bytewise = Wire::default();
        stream.iter().for_each(|byte| bytewise.push(&[*byte]));
        let got = lines(&mut all);
        assert_eq!(got, lines(&mut bytewise));
        assert_eq!(got[0].message, returned(Some(5), 1));
        assert!(!got[0].delimited && got[1].delimited && !got[2].delimited);
        assert_eq!(got[1].message, returned(None, 2));
        let refused = got[2].message.as_ref().expect("a message");
        assert_eq!(refused.outcome, Err("no".to_owned()));
        assert_eq!(got.len(), 3);
    }

    #[test]
    fn half_lines_before_a_sentinel_are_gone() {
        let mut wire = Wire::default();
        wire.push(b"{\"return\": 9}\n{\"retu");
        wire.push(b"\xff{\"return\": 7}\n");
        let got = lines(&mut wire);
        assert_eq!(got.len(), 2);
        assert_eq!(got[1].message, returned(None, 7));
        assert!(got[1].delimited);
    }

    #[test]
    fn garbage_is_named_and_bounded() {
        let mut wire = Wire::default();
        wire.push(b"{{{\n[1]\n{\"return\": 1, \"error\": {}}\n{}\n");
        assert!(lines(&mut wire).iter().all(|line| line.message.is_err()));
        for _ in 0..6 {
            wire.push(&vec![b'x'; 1 << 20]);
        }
        assert!(wire.received.len() < 3 << 20);
    }
}
