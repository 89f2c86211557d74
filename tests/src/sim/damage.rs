//! The end of a run: bits flip at rest, and nobody may be served what they make.

use super::super::faults::Fault;
use super::super::plan::Damage;
use super::super::trace;
use super::Run;

impl Run {
    /// Stops or kills the primary, flips a bit, and looks what becomes of it.
    pub(super) async fn damage_and_judge(&mut self) -> Result<(), String> {
        match self.plan.damage {
            Damage::None => {
                if self.stop().await? && self.rng.chance(3000) {
                    // Once more, from what the stop left.
                    let head = self.head();
                    self.start_life()?;
                    self.recoveries += 1;
                    self.judge_recovery(head)?;
                    drop(self.stop_shipping());
                }
                Ok(())
            }
            Damage::Repository => {
                drop(self.stop_shipping());
                for _ in 0..=self.rng.below(3) {
                    let what = self.site.shelf.flip_bit(&mut self.rng).await;
                    trace::note(&[50], || format!("a bit of {what:?} flips"));
                }
                self.site.check_damaged(&self.logs).await?;
                Ok(())
            }
            Damage::Claim => {
                if !self.stop().await? {
                    return Ok(());
                }
                trace::count(Fault::FlipClaim);
                let disk = self.rng.below(self.host.geometry.disks.len() as u64) as usize;
                let name = self.host.claim_name(disk).to_owned();
                self.flip_file(&name);
                let head = self.head();
                self.restart_damaged(head)
            }
            Damage::Log => {
                // Something for recovery to do.
                self.clients.left = 6;
                for _ in 0..self.rng.below(60) {
                    self.one_turn().await?;
                }
                self.host.world.kill();
                let answered = self.clients.answered;
                self.end_life()?;
                self.crash(false);
                trace::count(Fault::FlipLog);
                self.flip_file("log");
                self.restart_damaged(answered)
            }
            Damage::Ring => {
                self.clients.left = 6;
                for _ in 0..self.rng.below(60) {
                    self.one_turn().await?;
                }
                self.host.world.kill();
                let answered = self.clients.answered;
                self.end_life()?;
                self.crash(false);
                trace::count(Fault::FlipRing);
                let len = (self.host.geometry.ring_blocks + 1) * 4096;
                let at = self.rng.below(len) as usize;
                let bit = self.rng.below(8) as u8;
                trace::note(&[51, at as u64], || {
                    format!("bit {bit} of the ring's byte {at} flips")
                });
                self.host.world.flip_ring_bit("ring", at, bit);
                self.restart_damaged(answered)
            }
        }
    }

    fn flip_file(&mut self, name: &str) {
        let len = self.host.world.file_len(name);
        let at = self.rng.below(len);
        let bit = self.rng.below(8) as u8;
        trace::note(&[52, at], || {
            format!("bit {bit} of byte {at} of {name} flips")
        });
        self.host.world.flip_bit(name, at, bit);
    }

    /// Either the start is refused, or what was answered is there, whole.
    fn restart_damaged(&mut self, floor: u64) -> Result<(), String> {
        match self.start_life() {
            Ok(true) => {
                self.recoveries += 1;
                self.judge_recovery(floor)?;
            }
            Ok(false) => return Err("the process died though nothing killed it".to_owned()),
            Err(error) => {
                trace::note(&[53], || format!("refused, as it should be: {error}"));
                self.refusals += 1;
            }
        }
        drop(self.stop_shipping());
        Ok(())
    }
}
