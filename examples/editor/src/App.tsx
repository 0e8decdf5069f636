import { Component, lazy, type ReactNode, Suspense, useEffect, useState } from 'react'
import { useShallow } from 'zustand/react/shallow'

import { Code } from './Code.tsx'
import { showKept } from './kept.ts'
import { Preview } from './Preview.tsx'
import { save, showCheckpoints, showHistory, showSession, useProjectEditorStore as useStore } from './store.ts'
import { Tabs } from './Tabs.tsx'
import { Timeline } from './Timeline.tsx'
import { Tree } from './Tree.tsx'

// What compares two texts is a third of the page, and needed later or never.
const History = lazy(() => import('./History.tsx'))
const ConflictDialog = lazy(() => import('./ConflictDialog.tsx'))
const Checkpoints = lazy(() => import('./Checkpoints.tsx'))
const Kept = lazy(() => import('./Kept.tsx'))
const Session = lazy(() => import('./Session.tsx'))

/** A part that fails takes itself off the page; what was typed is kept, and the page is told. */
class Contained extends Component<{ children: ReactNode }, { error: Error | null }> {
  state = { error: null as Error | null }
  static getDerivedStateFromError(error: Error) {
    return { error }
  }
  render() {
    const { error } = this.state
    return error ? <p className="alone" role="alert">This part of the page failed ({error.message}). Nothing typed is lost: load the page again.</p> : this.props.children
  }
}

export function App() {
  const { config, failed, active, history, conflict, checkpoints, session, offline, deciding, waiting } = useStore(
    useShallow(({ config, failed, active, history, conflict, checkpoints, session, offline, deciding, kept }) => ({ config, failed, active, history, conflict, checkpoints, session, offline, deciding, waiting: kept.length })),
  )

  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if ((event.ctrlKey || event.metaKey) && event.key === 's') {
        event.preventDefault()
        const { active: path } = useStore.getState()
        if (path) void save(path)
      }
    }
    addEventListener('keydown', onKey)
    return () => removeEventListener('keydown', onKey)
  }, [])

  if (failed) return <main className="alone" role="alert">{failed}</main>
  if (!config) return <main className="alone" aria-busy="true">opening the project …</main>
  return (
    <div className="page">
      <header>
        <h1>{config.project_name}</h1>
        <Connection />
        <button aria-pressed={checkpoints !== null} disabled={offline !== null} onClick={() => (checkpoints ? useStore.setState({ checkpoints: null }) : showCheckpoints())}>Checkpoints</button>
        <button aria-pressed={session !== null} disabled={offline !== null} onClick={() => (session ? useStore.setState({ session: null }) : showSession())}>Session</button>
        <button aria-pressed={deciding} disabled={offline !== null} onClick={() => (deciding ? useStore.setState({ deciding: false }) : showKept())}>
          Proposals{waiting > 0 && <span className="waiting"> {waiting}</span>}
        </button>
        <Notice />
      </header>
      <nav aria-label="Files"><Tree /></nav>
      <main>
        {checkpoints && <Contained><Suspense><Checkpoints /></Suspense></Contained>}
        {deciding && <Contained><Suspense><Kept /></Suspense></Contained>}
        {session && <Contained><Suspense><Session /></Suspense></Contained>}
        <Tabs />
        {active ? history ? <Contained><Suspense><History {...history} /></Suspense></Contained> : <Code path={active} /> : <p className="alone">Open a file from the tree.</p>}
        {active && (
          <div className="bar">
            <button onClick={() => save(active)}>Save <kbd>Ctrl S</kbd></button>
            <button aria-pressed={history !== null} onClick={() => (history ? useStore.setState({ history: null }) : showHistory(active))}>History</button>
          </div>
        )}
      </main>
      <section className="right" aria-label="Preview">
        {offline ? <p className="alone">The preview comes from the stack.</p> : <Preview url={config.preview_url} />}
        <Timeline />
      </section>
      {conflict && <Contained><Suspense><ConflictDialog conflict={conflict} /></Suspense></Contained>}
    </div>
  )
}

function Connection() {
  const connected = useStore((state) => state.connected)
  const offline = useStore((state) => state.offline)
  const [waited, setWaited] = useState(false)
  useEffect(() => {
    const timer = setTimeout(() => setWaited(true), 3000)
    return () => clearTimeout(timer)
  }, [])
  if (offline) return <span className="state bad" role="status">nobody answers: this is what was open here at {new Date(offline).toLocaleTimeString()}. What you type is kept, and can be saved when the stack runs again</span>
  if (connected || !waited) return <span className="state ok">{connected ? 'connected' : 'connecting …'}</span>
  return <span className="state bad" role="status">not connected: you can read and type, and saving is tried when you save</span>
}

function Notice() {
  const notice = useStore((state) => state.notice)
  return (
    <p className={`notice ${notice?.kind ?? ''}`} role={notice?.kind === 'error' ? 'alert' : 'status'}>
      {notice?.text}
      {notice && <button aria-label="Dismiss" onClick={() => useStore.setState({ notice: null })}>×</button>}
    </p>
  )
}
