//! Mailrun's guarantees, with the real servers and processes: each test has its own database and virtual host.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod access;
mod agreement;
mod bounces;
mod clock;
mod doctor;
mod encryption;
mod erase;
mod fuzz_http;
mod housekeeping;
mod installed;
mod late_results;
mod later_words;
mod liveness;
mod mailboxes;
mod malformed;
mod metrics;
mod overload;
mod pacing;
mod pages;
mod pipeline;
mod quiet;
mod real_mail;
mod real_mail_web;
mod refusals;
mod rejections;
mod restore;
mod roles;
mod submission;
mod support;
mod upgrade;
mod watchdog;
mod your_own_job;
