import { useShallow } from 'zustand/react/shallow'

import { whoIs } from './screen.ts'
import { openFile, type Revision, useProjectEditorStore as useStore } from './store.ts'

const ms = (value: number | null) => (value === null ? '–' : value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`)

export function Timeline() {
  const { revisions, begun } = useStore(useShallow((state) => ({ revisions: state.revisions, begun: state.begun })))
  return (
    <div className="timeline">
      <h2>Timeline</h2>
      {revisions.length + begun.length === 0 ? (
        <p className="hint">Save a file: this is where you see when it is in the database, on the disk and on the screen.</p>
      ) : (
        <table>
          <thead>
            <tr><th scope="col">revision</th><th scope="col">what</th><th scope="col">saved</th><th scope="col">applied</th><th scope="col">on screen</th></tr>
          </thead>
          <tbody>
            {begun.map(({ id, title }) => <tr key={`begun ${id}`} className="begun"><td>–</td><td>{title}</td><td>saving …</td><td>–</td><td>–</td></tr>)}
            {revisions.map((each) => <Row key={each.revision} revision={each} />)}
          </tbody>
        </table>
      )}
    </div>
  )
}

function Row({ revision: each }: { revision: Revision }) {
  const { revision, title, files, turn, saved, applied, shown, outcome } = each
  const failed = outcome === 'error'
  return (
    <tr className={failed ? 'failed' : ''}>
      <td>{revision}</td>
      <td>
        {files.length > 1 ? (
          <details>
            <summary>{title}{turn ? ', one turn' : ''} ({files.length} files)</summary>
            {files.map((path) => <button key={path} onClick={() => openFile(path)}>{path}</button>)}
          </details>
        ) : (
          <button onClick={() => files[0] && openFile(files[0])}>{title}</button>
        )}
        <span className="hint"> by {whoIs(each)}</span>
      </td>
      <td>{ms(saved)}</td>
      <td>{ms(applied)}</td>
      <td>{failed && shown === null ? 'error' : ms(shown)}</td>
    </tr>
  )
}
