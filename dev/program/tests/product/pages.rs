//! The pages in a real browser: what a person does and sees.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::Duration,
};

use crate::support::{World, people, say, until};
use fantoccini::{Client, ClientBuilder, Locator};
use hyper_util::client::legacy::connect::HttpConnector;
use mailrun_stack::{CHROMIUM, ensure_packages};
use serde_json::json;

/// The browser's driver, which ends with the test.
struct Driver(Child);

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn browser(profile: &std::path::Path) -> (Driver, Client) {
    ensure_packages(&[CHROMIUM], say).await.unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let driver = Command::new("chromedriver")
        .arg(format!("--port={port}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let driver = Driver(driver);
    let url = format!("http://127.0.0.1:{port}");
    until("the driver listens", async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()).await;
    let profile = format!("--user-data-dir={}", profile.display());
    let args = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        &profile,
    ];
    let capabilities = json!({ "goog:chromeOptions": { "args": args } });
    let client = ClientBuilder::new(HttpConnector::new())
        .capabilities(capabilities.as_object().unwrap().clone())
        .connect(&url)
        .await
        .unwrap();
    (driver, client)
}

async fn text(page: &Client, css: &str) -> String {
    match page.find(Locator::Css(css)).await {
        Ok(element) => element.text().await.unwrap_or_default(),
        Err(_) => String::new(),
    }
}

#[tokio::test]
async fn a_person_pastes_sends_watches_the_bar_and_retries() {
    let mut world = World::new(&[]).await;
    world.workers();
    let (_driver, page) = browser(&world.folder.path().join("profile")).await;
    page.goto(&world.web).await.unwrap();
    // Pasting, as far as the page can tell: typing a thousand lines would take the driver minutes.
    let list = json!(people(1000));
    page.execute("document.querySelector('#emails').value = arguments[0]", vec![list]).await.unwrap();
    page.find(Locator::XPath("//button[normalize-space()='Send Invites']")).await.unwrap().click().await.unwrap();

    page.wait().at_most(Duration::from_secs(60)).for_element(Locator::Css("#bar")).await.unwrap();
    until("the bar has reached its end", async || {
        text(&page, "#progress-text").await == "990 successful, 10 failed of 1,000"
    })
    .await;
    until("the failures are listed with their error", async || {
        text(&page, "#troubles").await.contains("Internet Down")
    })
    .await;
    let retry = page.wait().at_most(Duration::from_secs(60)).for_element(Locator::Css("#retry")).await.unwrap();
    retry.click().await.unwrap();
    until("all have been sent", async || text(&page, "#progress-text").await == "1,000 successful of 1,000").await;
    until("nothing is left to retry", async || page.find(Locator::Css("#retry")).await.is_err()).await;
    page.close().await.unwrap();
}

#[tokio::test]
async fn a_slip_of_the_finger_invites_nobody_and_a_test_leaves_the_form_as_it_is() {
    let mut world = World::new(&[]).await;
    world.workers();
    let (_driver, page) = browser(&world.folder.path().join("profile")).await;
    page.goto(&world.web).await.unwrap();
    let field = async |id| page.find(Locator::Id(id)).await.unwrap();
    field("emails").await.send_keys("ann@example.org").await.unwrap();
    field("subject").await.send_keys("\u{e007}").await.unwrap();
    field("test_email").await.send_keys("me@example.org\u{e007}").await.unwrap();
    until("the test has a tab of its own", async || page.windows().await.unwrap().len() == 2).await;
    let windows = page.windows().await.unwrap();
    page.switch_to_window(windows[1].clone()).await.unwrap();
    until("it says that the test is sent", async || text(&page, "h1").await == "Test sent").await;

    page.switch_to_window(windows[0].clone()).await.unwrap();
    assert_eq!(field("emails").await.prop("value").await.unwrap().unwrap(), "ann@example.org");
    assert_eq!(page.current_url().await.unwrap().path(), "/");
    page.find(Locator::XPath("//button[normalize-space()='Send Invites']")).await.unwrap().click().await.unwrap();
    until("the run is over", async || text(&page, "#progress-text").await == "1 successful of 1").await;
    page.close().await.unwrap();
}

#[tokio::test]
async fn the_count_is_a_guess_until_the_server_has_read_the_list() {
    let world = World::new(&[]).await;
    let (_driver, page) = browser(&world.folder.path().join("profile")).await;
    page.goto(&world.web).await.unwrap();
    let watch = "window.seen = []; const count = document.getElementById('count');
                 new MutationObserver(() => window.seen.push(count.textContent)).observe(count, { childList: true });";
    page.execute(watch, vec![]).await.unwrap();
    let list = "Ann <ann@bücher.example> Bob <bob@x.org>\nann@xn--bcher-kva.example\nnobody";
    let paste = "const emails = document.getElementById('emails'); emails.value = arguments[0];
                 emails.dispatchEvent(new Event('input'));";
    page.execute(paste, vec![json!(list)]).await.unwrap();
    until("the server has counted", async || {
        text(&page, "#count").await == "2 people, 1 address repeated, 1 invalid entry"
    })
    .await;
    assert_eq!(page.execute("return window.seen[0]", vec![]).await.unwrap(), json!("about 3 addresses"));

    // A file in the code page of Windows, and one in UTF-16.
    let utf16: Vec<u8> = "\u{feff}Groß <g@x.org>".encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (bytes, last) in [(b"Ren\xe9e <r@x.org>".to_vec(), "Renée <r@x.org>"), (utf16, "Groß <g@x.org>")] {
        let file = world.folder.path().join("list.txt");
        std::fs::write(&file, bytes).unwrap();
        let input = page.find(Locator::Css("#from-file input")).await.unwrap();
        input.send_keys(file.to_str().unwrap()).await.unwrap();
        let emails = page.find(Locator::Id("emails")).await.unwrap();
        until("the file is read", async || {
            emails.prop("value").await.unwrap().is_some_and(|value| value.ends_with(last))
        })
        .await;
    }
    page.close().await.unwrap();
}

#[tokio::test]
async fn a_page_whose_login_is_refused_stops_asking_and_says_why() {
    let mut world = World::new(&[]).await;
    let run = world.invite("ann@example.org").await;
    let (_driver, page) = browser(&world.folder.path().join("profile")).await;
    page.goto(&run).await.unwrap();
    until("the page is up to date", async || !text(&page, "#progress-text").await.is_empty()).await;
    let count = "window.asked = 0; const ask = window.fetch; window.fetch = (...what) => { window.asked += 1; return ask(...what); };";
    page.execute(count, Vec::new()).await.unwrap();
    // The pages get a password: what the open page asks is answered by 401 from now on.
    world.kill(0);
    world.set("MAILRUN_WEB__PASSWORD", "correct horse".to_owned());
    world.start(&["web"]);
    until("it explains itself", async || text(&page, "#connection").await.contains("Reload it to log in")).await;
    // It asks no more, even when the browser has reason to.
    let asked = "return window.asked";
    let before = page.execute(asked, Vec::new()).await.unwrap();
    page.execute("window.dispatchEvent(new Event('online'))", Vec::new()).await.unwrap();
    assert_eq!(page.execute(asked, Vec::new()).await.unwrap(), before);
    assert!(text(&page, "#connection").await.contains("Reload it to log in"));
    page.close().await.unwrap();
}
